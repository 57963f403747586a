"""How well a caption fits its picture, and the vectors of both, by a CLIP.

Vectors are comparable only where the CLIP's identity is the same: it is among the settings, and in the file's schema
metadata under `clip`, beside the device that computed it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import FINDINGS, HeadraceError, file_sha256
from pipeline.clip import MINI, Preprocess
from pipeline.clip import load as load_clip
from pipeline.signals import Picture, SignalOptions

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from pipeline.clip import Clip

THREADS = 1  # of torch per worker, always: sums of floats depend on how they are split


def settings(options: SignalOptions) -> dict[str, Any]:
    """What the bytes depend on. The device is not among them: it moves the similarity by 1e-5, or 0.005 on a GPU."""
    return {"version": 1, "identity": identity(options.clip)}


def load(options: SignalOptions) -> ClipSignal:
    """The CLIP in memory."""
    clip, expected = load_clip(options.clip, options.device), identity(options.clip)
    if clip.identity != expected:
        message = f"the config of CLIP {options.clip} describes another one than open_clip builds from it"
        hint = "write its preprocess_cfg out in full (size, mean, std, interpolation, resize_mode)"
        raise HeadraceError(message, hint=hint, code=FINDINGS)
    return ClipSignal(clip)


def identity(name: str) -> dict[str, Any]:
    """The `Clip.identity` of a CLIP; for one in a directory from its files alone, so that nothing heavy is loaded.

    Raises:
        HeadraceError: there is no such CLIP, or it is broken.
    """
    folder = MINI if name == "mini" else Path(name)
    weights = folder / "open_clip_model.safetensors"
    try:
        values = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        described = _described(values["model_cfg"], values["preprocess_cfg"])
        return {
            "name": "mini" if name == "mini" else folder.resolve().name,
            "weights_sha256": file_sha256(weights),
            "preprocessing": str(described),
            "dimension": values["model_cfg"]["embed_dim"],
        }
    except (OSError, ValueError, KeyError, TypeError):  # not a directory of the full form: load it, or say why not
        return load_clip(name, "cpu").identity


def _described(model: dict[str, Any], preprocess: dict[str, Any]) -> Preprocess:
    size = model["vision_cfg"]["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    interpolation = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
    mode, fill = preprocess.get("resize_mode") or "shortest", preprocess.get("fill_color") or 0
    return Preprocess(height, width, mode, interpolation, tuple(preprocess["mean"]), tuple(preprocess["std"]), fill)


class ClipSignal:
    """`clip_sim`: the cosine before rounding, in [-1, 1]; `image_emb`, `text_emb`: unit vectors.

    Without caption `clip_sim` and `text_emb` are NULL.
    """

    reads = frozenset({"pixels", "caption"})

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def schema(self) -> pa.Schema:
        """The columns; the metadata holds identity and device."""
        import pyarrow as pa

        vector = pa.list_(pa.float16(), self._clip.dimension)
        made_by = {"identity": self._clip.identity, "device": self._clip.device.type}
        fields = [("clip_sim", pa.float32()), ("image_emb", vector), ("text_emb", vector)]
        return pa.schema(fields, metadata={"clip": json.dumps(made_by, sort_keys=True)})

    def look(self, picture: Picture) -> tuple[torch.Tensor, str | None] | None:
        """The picture as the image tower's bytes (3, side, side), and the caption."""
        if picture.pixels is None:
            return None
        with _threads(THREADS):
            return self._clip.image_input([picture.pixels])[0], picture.caption

    def columns(self, seen: Sequence[tuple[torch.Tensor, str | None]]) -> pa.Table:
        """Vectors and their cosine."""
        import numpy as np
        import pyarrow as pa
        import torch

        from pipeline.shards import vector_column

        captioned = np.array([caption is not None for _, caption in seen])
        texts = np.zeros((len(seen), self._clip.dimension), dtype=np.float32)
        with _threads(THREADS):
            images = self._clip.encode_images(torch.stack([small for small, _ in seen]))
            texts[captioned] = self._clip.encode_texts([caption for _, caption in seen if caption is not None])
        cosine = pa.array(_cosine(images, texts), pa.float32(), mask=~captioned)
        every = np.ones(len(seen), dtype=bool)
        columns = [cosine, vector_column(images, every), vector_column(texts, captioned)]
        return pa.table(columns, schema=self.schema())


def _cosine(images: NDArray[np.float32], texts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row by row, of unit vectors (N, D); summed in double and in one fixed order."""
    import numpy as np

    cosine: NDArray[np.float64] = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    return cosine.astype(np.float32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch on that many threads, and as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
