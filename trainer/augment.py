"""Variations of training pairs that keep the caption true, and captions made false by exchanging words.

Pure functions of their arguments; randomness is a generator. It knows nothing of models or files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trainer.config import Augmentation

COARSE_GROUPS = 4
FRAME_WIDTH = 0.1

# Words of one group are exchanged for each other where a caption holds two of them that differ in meaning.
EXCHANGED = (
    ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray"),
    ("small", "large", "big", "little", "tiny", "huge"),
)
SYNONYMS = {"big": "large", "huge": "large", "little": "small", "tiny": "small", "gray": "grey"}
# Words that are replaced by their opposite, all of one pair at once.
OPPOSITES = (("left", "right"), ("above", "below"), ("top", "bottom"), ("over", "under"))
JOINED = re.compile(r"\w+(?:(?:\s+(?:and|or)\s+|\s*[/&-]\s*)\w+)+")
# What is in sentences and in no keyword.
FUNCTION_WORD = re.compile(r"\b(an?|and|are|at|but|by|for|from|in|is|it|not|on|or|that|the|this|to|was|with)\b", re.I)
KEYWORD_WORDS = 3  # of a keyword, at most
# What makes a caption false of the mirrored picture: sides, and things that have one in pictures of them.
SIDED = re.compile(
    r"\b(left|right|east|west)|clockwise|o.?clock|quarter|crescent|gibbous|\b(flag|letter|keycap|number)s?\b", re.I
)


def vary_pictures(
    pictures: torch.Tensor, size: tuple[int, int], how: Augmentation, generator: torch.Generator, sided: torch.Tensor
) -> torch.Tensor:
    """Cropped, stretched, mirrored, slightly recoloured, coarsened and framed pictures.

    uint8 (N, 3, H, W) -> uint8 (N, 3, *size). Where `sided`, bool (N,), nothing is mirrored; nothing is turned.
    """
    import torch
    from torch.nn import functional as F

    count = len(pictures)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    share = 1 - (1 - how.crop) * uniform(count) ** 2  # most crops are mild
    stretch = torch.exp(how.stretch * (2 * uniform(count) - 1))
    scale = torch.stack([share * stretch, share / stretch], dim=1).clamp(max=1)  # (N, 2): x, y
    centre = (1 - scale) * (2 * uniform(count, 2) - 1)
    mirrored = (uniform(count) < how.mirror) & ~sided
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], centre
    theta[mirrored, 0, 0] *= -1
    grid = F.affine_grid(theta, [count, 3, *size], align_corners=False)
    out = F.grid_sample(pictures.float(), grid, padding_mode="border", align_corners=False)
    groups = [_coarsened(group, how.coarse, uniform(2)) for group in out.chunk(COARSE_GROUPS)]
    out = torch.cat(groups)
    grey = out.mean(dim=1, keepdim=True)
    out = grey + (out - grey) * (1 + how.saturation * (2 * uniform(count, 1, 1, 1) - 1))
    gain = 1 + how.brightness * (2 * uniform(count, 1, 1, 1) - 1)
    shift = 255 * how.tint * (2 * uniform(count, 3, 1, 1) - 1)
    sigma = 255 * how.noise * uniform(count, 1, 1, 1)
    noise = torch.randn(out.shape, generator=generator)
    out = (out * gain + shift + sigma * noise).clamp(0, 255)
    framed = _frames(size, how.frame, uniform(count, 2))
    grey = 255 * uniform(count, 1, 1, 1).mul(2).clamp(max=1)  # every second frame is white
    return torch.where(framed, grey, out).round().to(torch.uint8)


def _frames(size: tuple[int, int], share: float, draws: torch.Tensor) -> torch.Tensor:
    """Where a `share` of the pictures have a frame: bool (N, 1, *size), at most FRAME_WIDTH of a side wide."""
    import torch

    width = torch.where(draws[:, 0] < share, FRAME_WIDTH * draws[:, 1], 0)[:, None]
    near = [torch.minimum(line, 1 - line) for line in ((torch.arange(n) + 0.5) / n for n in size)]
    rows, columns = (edge[None, :] < width for edge in near)
    return (rows[:, :, None] | columns[:, None, :])[:, None]


def _coarsened(pictures: torch.Tensor, share: float, draws: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional as F

    if draws[0] >= share:
        return pictures
    height, width = pictures.shape[2:]
    factor = 0.5 + 0.45 * float(draws[1])
    small = F.interpolate(
        pictures, size=(round(height * factor), round(width * factor)), mode="bilinear", antialias=True
    )
    return F.interpolate(small, size=(height, width), mode="bilinear")


def vary_caption(caption: str, drop_parts: float, rng: np.random.Generator) -> str:
    """A keyword caption without some of its parts, in another order; a sentence as it is."""
    parts = keywords(caption)
    if not parts or rng.random() >= drop_parts:
        return caption
    kept = [part for part in parts if rng.random() < 0.7] or [parts[0]]
    return ", ".join(kept[i] for i in rng.permutation(len(kept)))


def keywords(caption: str) -> list[str]:
    """The parts of a keyword caption, three or more between commas; of a sentence, none.

    The first may be a title of any length; the others are a few words each, none of which makes sentences.
    """
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    plain = all(len(part.split()) <= KEYWORD_WORDS and not FUNCTION_WORD.search(part) for part in parts[1:])
    return parts if len(parts) >= 3 and plain else []


def words_of(text: str) -> list[str]:
    """A text's words, in lower case."""
    return re.findall(r"\w+", text.lower())


def names_side(caption: str) -> bool:
    """Whether a caption tells left from right, or may."""
    return SIDED.search(caption) is not None


def swapped_captions(caption: str) -> list[str]:
    """The caption with colours, sizes or sides exchanged; empty where it has nothing to exchange, or where that
    would say the same again ("black and white", or keywords in another order).
    """
    words = re.findall(r"[a-z]+", caption.lower())
    changes: list[dict[str, str]] = []
    for group in EXCHANGED:
        found: dict[str, str] = {}
        for word in words:
            if word in group:
                found.setdefault(SYNONYMS.get(word, word), word)
        if len(found) >= 2:
            one, other, *_ = found.values()
            changes.append({one: other, other: one})
    for one, other in OPPOSITES:
        if one in words or other in words:
            changes.append({one: other, other: one})
    swaps = [_exchange(caption, change) for change in changes]
    return [swap for swap in swaps if _said(swap) != _said(caption)]


def _said(caption: str) -> list[str]:
    """A caption's parts between commas, sorted, in each of them the words that "and" and the like join, sorted."""

    def ordered(joined: re.Match[str]) -> str:
        return " ".join(sorted(re.findall(r"\w+", joined.group())))

    return sorted(JOINED.sub(ordered, part.strip()) for part in caption.lower().split(","))


def _exchange(caption: str, change: dict[str, str]) -> str:
    pattern = re.compile(rf"\b({'|'.join(change)})\b", re.IGNORECASE)
    return pattern.sub(lambda match: change[match.group().lower()], caption)
