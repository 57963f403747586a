"""Views in other looks, as things are printed: in two inks, as lines, hatched, on paper, framed beside lettering.

Drawings on white are a narrow world. What a CLIP is to recognise in print, painting or engraving, its teacher should
have shown it so (Geirhos et al. 2019, "ImageNet-trained CNNs are biased towards texture; increasing shape bias
improves accuracy and robustness"). Colours stay where a caption names any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.views import COLOURED, SIDE, Pixels, views

Shades = NDArray[np.float32]  # (SIDE, SIDE, 3) in [0, 1]
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)
LINES = 12  # grey levels between two blurs that make a line black


def looks(
    pictures: Iterable[Image.Image], captions: Sequence[str], count: int, seed: int
) -> Iterator[tuple[Pixels, str]]:
    """`count` views uint8 (SIDE, SIDE, 3) of these drawings (`benchmarks.views`), each in other looks."""
    rng = np.random.default_rng((seed, 9))
    for view, caption in views(pictures, captions, count, seed):
        yield restyled(view, rng, COLOURED.search(caption) is not None), caption


def restyled(view: Pixels, rng: np.random.Generator, coloured: bool) -> Pixels:
    """A view with each look by chance; where colours are told, `coloured`, they stay."""
    x = view.astype(np.float32) / 255
    for look, share in LOOKS:
        if rng.random() < share:
            x = np.clip(look(x, rng, coloured), 0, 1).astype(np.float32)
    return (x * 255).round().astype(np.uint8)


def _ground(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """On a ground of two colours in place of white."""
    if coloured:
        return x
    first, second = rng.uniform(0.2, 1, 3), rng.uniform(0.2, 1, 3)
    return np.asarray(x * (first + (second - first) * _clouds(rng, int(rng.integers(2, 6)))[..., None]))


def _lines(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """Edges alone, as the difference of two blurs."""
    grey, radius = _bytes(x @ LUMINANCE), rng.uniform(0.6, 1.4)
    between = _blurred(grey, radius).astype(np.float32) - _blurred(grey, 1.8 * radius)
    edges = np.abs(between) if rng.random() < 0.5 else np.maximum(-between, 0)
    return x if coloured else _in_inks(np.clip(1 - edges / LINES, 0, 1), rng)


def _two_inks(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    return x if coloured else _in_inks(x @ LUMINANCE, rng)


def _hatched(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """Strokes of one or two directions, the denser the darker."""
    y, across = np.mgrid[:SIDE, :SIDE]
    angle, period = rng.uniform(0, np.pi), rng.uniform(2.5, 6)
    waves = 0.5 + 0.5 * np.sin((across * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    if rng.random() < 0.4:
        waves = 0.5 * waves + 0.25 + 0.25 * np.sin((y * np.cos(angle) - across * np.sin(angle)) * 2 * np.pi / period)
    strokes = 1 / (1 + np.exp(-(x @ LUMINANCE - waves) * rng.uniform(3, 12)))
    return np.asarray(x * (0.5 + 0.5 * strokes[..., None])) if coloured else _in_inks(strokes, rng)


def _framed(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """Smaller, on a sheet, within a line of up to three pixels, with up to two lines of something like lettering."""
    width, height = (int(SIDE * share) for share in rng.uniform(0.55, 0.9, 2))
    left, top = int(rng.integers(SIDE - width)), int(rng.integers(SIDE - height))
    sheet = rng.uniform(0.6, 1, 3) if rng.random() < 0.7 else rng.uniform(0, 1, 3)
    out = np.ones_like(x) * (1 if coloured else sheet)
    line = int(rng.integers(0, 4))
    ink = np.zeros(3) if coloured else rng.uniform(0, 0.6, 3)
    if line:
        out[max(0, top - line) : top + height + line, max(0, left - line) : left + width + line] = ink
    small = Image.fromarray((np.clip(x, 0, 1) * 255).astype(np.uint8))
    out[top : top + height, left : left + width] = (
        np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)) / 255
    )
    for _ in range(rng.integers(0, 3)):
        tall = int(rng.integers(5, 12))
        y = int(rng.integers(0, SIDE - tall))
        start, end = sorted(rng.integers(0, SIDE, 2))
        if end - start > 8:
            dots = rng.random(((tall + 1) // 2, (end - start + 1) // 2)) < 0.5
            letters = dots.repeat(2, 0).repeat(2, 1)[:tall, : end - start, None]
            out[y : y + tall, start:end] = np.where(letters, ink, out[y : y + tall, start:end])
    return np.asarray(out)


def _toned(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """With another contrast, brightness and gamma."""
    levels = np.clip((x - 0.5) * rng.uniform(0.5, 1.4) + 0.5 + rng.uniform(-0.1, 0.1), 0, 1)
    return np.asarray(levels ** np.exp(rng.uniform(-0.6, 0.6)))


def _papered(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    """On paper: tinted, uneven, with grain."""
    tint = np.ones(3) if coloured else rng.uniform(0.75, 1, 3)
    uneven = _clouds(rng, int(rng.integers(3, 40)))[..., None]
    return np.asarray(x * tint * (1 - rng.uniform(0.05, 0.3) * uneven) + rng.normal(0, rng.uniform(0, 0.06), x.shape))


def _soft(x: Shades, rng: np.random.Generator, coloured: bool) -> Shades:
    return np.asarray(_blurred(_bytes(np.clip(x, 0, 1)), rng.uniform(0.5, 1.6)) / 255)


def _in_inks(grey: NDArray[np.float64], rng: np.random.Generator) -> Shades:
    """Grey levels (SIDE, SIDE) in [0, 1] between a dark and a light colour."""
    dark, light = rng.uniform(0, 0.5, 3), rng.uniform(0.6, 1, 3)
    return np.asarray(dark + (light - dark) * grey[..., None])


def _clouds(rng: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """Smooth noise (SIDE, SIDE) of so many cells a side."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _blurred(picture: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def _bytes(x: Shades) -> Pixels:
    return (x * 255).astype(np.uint8)


Look = Callable[[Shades, np.random.Generator, bool], Shades]
LOOKS: tuple[tuple[Look, float], ...] = (  # in this order, each for so large a share of views
    (_ground, 0.35),
    (_lines, 0.12),
    (_two_inks, 0.3),
    (_hatched, 0.12),
    (_framed, 0.35),
    (_toned, 0.5),
    (_papered, 0.4),
    (_soft, 0.3),
)
