"""Views of drawings, further from the drawings than training's own variations: cropped, turned, in another hue, and two
drawings at once.

A CLIP that has 4,644 drawings to learn sight from learns them by heart; a teacher that says what it makes of tens of
thousands of views shows it far more of how the teacher sees (Beyer et al. 2022, "Knowledge distillation: a good teacher
is patient and consistent"). Captions stay true, as far as words tell it: a crop may lose a thing that is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.augment import EXCHANGED, names_side

SIDE = 144  # pixels, of a drawing and of its views
TURNED, MIRRORED, RECOLOURED = 0.5, 0.5, 0.6  # shares of views
MOST_TURNED = 30.0  # degrees
SMALLEST, STRETCH = 0.5, 0.2  # of a side that is left, and the largest relative change of the sides
ALONE = 0.4  # share of views with one drawing
COLOURED = re.compile(rf"\b({'|'.join(EXCHANGED[0])}|gold|golden|silver|navy|rainbow|flags?)\b", re.IGNORECASE)

Pixels = NDArray[np.uint8]
Views = Callable[[Iterable[Image.Image], Sequence[str], int, int], Iterator[tuple[Pixels, str]]]


def views(
    pictures: Iterable[Image.Image], captions: Sequence[str], count: int, seed: int
) -> Iterator[tuple[Pixels, str]]:
    """`count` views uint8 (SIDE, SIDE, 3) of these drawings, each with a caption that is true of it."""
    rng = np.random.default_rng(seed)
    small = [picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]
    for _ in range(count):
        one, other = rng.integers(len(small), size=2)
        view = distorted(small[one], captions[one], rng)
        if captions[one] == captions[other] or rng.random() < ALONE:
            yield view, captions[one]
        else:
            both = joined(view, distorted(small[other], captions[other], rng), rng)
            yield both, f"{captions[one]}, {captions[other]}"


def distorted(picture: Image.Image, caption: str, rng: np.random.Generator) -> Pixels:
    """One drawing turned, cropped, mirrored and in another hue, but for what its caption tells of sides and colours."""
    sided, coloured = names_side(caption), COLOURED.search(caption) is not None
    turned, mirrored, recoloured = rng.random(3) < (TURNED, MIRRORED, RECOLOURED)
    angle, hue = rng.uniform(-MOST_TURNED, MOST_TURNED), int(rng.integers(256))
    if turned and not sided:
        corner = picture.getpixel((0, 0))
        picture = picture.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=corner)
    picture = cropped(picture, rng)
    if mirrored and not sided:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recoloured and not coloured:
        h, s, v = picture.convert("HSV").split()
        picture = Image.merge("HSV", (h.point(lambda value: (value + hue) % 256), s, v)).convert("RGB")
    return np.asarray(picture)


def cropped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Part of a picture, at its full size, slightly stretched."""
    share, stretch = rng.uniform(SMALLEST, 1), np.exp(rng.uniform(-STRETCH, STRETCH, size=2))
    width, height = SIDE * np.minimum(share * stretch, 1)
    x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))


def joined(one: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """Two drawings in one picture, in three ways: the strokes of both, both faintly, one laid upon the other."""
    way = rng.integers(3)
    first, second = one.astype(np.float32), other.astype(np.float32)
    if way == 0:
        return np.asarray(first * second / 255).astype(np.uint8)
    if way == 1:
        share = rng.uniform(0.2, 0.5)
        return np.asarray(first + share * (second - first)).astype(np.uint8)
    width, height = (int(SIDE * part) for part in rng.uniform(0.4, 0.75, size=2))
    x, y = rng.integers(SIDE - width), rng.integers(SIDE - height)
    out = one.copy()
    out[y : y + height, x : x + width] = Image.fromarray(other).resize((width, height), Image.Resampling.BILINEAR)
    return out
