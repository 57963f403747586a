"""Plain figures of a picture's pixels: shape, light, detail, and whether there is anything to see at all.

All are computed from whole-number sums, so that they are the same on every machine. A picture that cannot be decoded
has its reason in `decode_error` and NULL elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.signals import Picture, SignalOptions

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from PIL.Image import Image

NEAR = 12  # grey levels from the median that count as the same colour: what JPEG does to a flat area
BLANK = 0.998  # share of such pixels from which a picture is near blank: in 256 x 256, a mark of 11 x 11 is a picture


def settings(options: SignalOptions) -> dict[str, Any]:
    """What the bytes depend on."""
    return {"version": 1, "pillow": version("pillow")}


def load(options: SignalOptions) -> Figures:
    """Ready to work."""
    return Figures()


class Figures:
    """See `measure` for the columns."""

    reads = frozenset({"pixels"})

    def schema(self) -> pa.Schema:
        """`decode_error`, the figures, `near_blank`."""
        import pyarrow as pa

        names = ("aspect", "brightness", "contrast", "entropy", "saturation", "sharpness", "flat")
        fields = [("decode_error", pa.string()), *((name, pa.float32()) for name in names)]
        return pa.schema([*fields, ("near_blank", pa.bool_())])

    def look(self, picture: Picture) -> dict[str, Any]:
        """The figures, or the reason why there are none."""
        return {"decode_error": picture.error} if picture.pixels is None else measure(picture.pixels)

    def columns(self, seen: Sequence[dict[str, Any]]) -> pa.Table:
        """The figures as columns."""
        import pyarrow as pa

        return pa.Table.from_pylist(list(seen), self.schema())


def measure(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """The figures of RGB pixels (H, W, 3).

    - `aspect`: long side by short side, at least 1;
    - `brightness`, `contrast`: mean and standard deviation of grey (ITU-R 601) over 255: in [0, 1] and [0, 0.5];
    - `entropy`: of the grey histogram, in bits, in [0, 8];
    - `saturation`: mean of HSV's S, in [0, 1];
    - `sharpness`: variance of grey's Laplacian (4 neighbours, borders left out), in squared grey levels; low is
      blurred (Pech-Pacheco et al. 2000);
    - `flat`: share of pixels near the median colour in every channel, in [0, 1]; `near_blank` is its threshold.
    """
    import numpy as np
    from PIL import Image

    image = Image.fromarray(pixels)
    grey = image.convert("L")
    histogram = np.array(grey.histogram(), dtype=np.int64)
    saturation = np.array(image.convert("HSV").getchannel("S").histogram(), dtype=np.int64)
    mean, deviation = _moments(histogram)
    flat = _flat(image, pixels)
    return {
        "aspect": max(image.size) / min(image.size),
        "brightness": mean / 255,
        "contrast": deviation / 255,
        "entropy": _entropy(histogram),
        "saturation": _moments(saturation)[0] / 255,
        "sharpness": _laplacian_variance(np.asarray(grey)),
        "flat": flat,
        "near_blank": flat >= BLANK,
    }


def _moments(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation of the levels 0 to 255, from how often each occurs."""
    import numpy as np

    levels, count = np.arange(256), int(histogram.sum())
    total, squares = int(histogram @ levels), int(histogram @ levels**2)
    return total / count, float((squares * count - total**2) ** 0.5) / count


def _entropy(histogram: NDArray[np.int64]) -> float:
    import numpy as np

    shares = histogram[histogram > 0] / histogram.sum()
    return abs(float(-(shares * np.log2(shares)).sum()))


def _laplacian_variance(grey: NDArray[np.uint8]) -> float:
    """Variance of the four-neighbour Laplacian inside the border; 0 for a picture that has no inside."""
    import numpy as np

    if min(grey.shape) < 3:
        return 0.0
    level = grey.astype(np.int16)
    laplacian = level[:-2, 1:-1] + level[2:, 1:-1] + level[1:-1, :-2] + level[1:-1, 2:] - 4 * level[1:-1, 1:-1]
    total = int(laplacian.sum(dtype=np.int64))
    squares = int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    return (squares * laplacian.size - total**2) / laplacian.size**2


def _flat(image: Image, pixels: NDArray[np.uint8]) -> float:
    import numpy as np

    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256).cumsum(axis=1)
    medians = [int(np.searchsorted(row, (row[-1] + 1) // 2)) for row in counts]
    near = np.ones(pixels.shape[:2], dtype=bool)
    for channel, median in enumerate(medians):
        low, high = max(median - NEAR, 0), min(median + NEAR, 255)
        near &= (pixels[:, :, channel] >= low) & (pixels[:, :, channel] <= high)
    return int(near.sum()) / near.size
