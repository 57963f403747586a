"""How well pictures match their captions by a CLIP's vectors: R-precision among many, swaps told apart, CLIP score.

Arrays and strings in, numbers out; all vectors are unit rows. This module knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainer.augment import words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.floating[Any]]  # (N, D)

AMONG = 100  # captions that a picture chooses from, its own included
Kind = Literal["attribute", "relation"]
SIDES = ("left", "right", "top", "bottom", "front", "behind", "before", "inside", "outside")
PLACES = frozenset((*SIDES, "above", "over", "below", "under", "beneath", "underneath"))


def choices(captions: Sequence[str], swaps: Sequence[Sequence[str]], pool: Sequence[str], seed: int) -> list[list[str]]:
    """For every row what its picture chooses from: its caption first, its swaps, then others drawn from the pool.

    AMONG in all, none twice; fewer where the pool has no more.
    """
    rng = np.random.default_rng(seed)
    others = list(dict.fromkeys(pool))
    rows = []
    for caption, wrong in zip(captions, swaps, strict=True):
        chosen = dict.fromkeys([caption, *wrong][:AMONG])
        for number in rng.permutation(len(others)):
            if len(chosen) == AMONG:
                break
            chosen.setdefault(others[number])
        rows.append(list(chosen))
    return rows


def ranks(pictures: Rows, chosen: Sequence[Sequence[Rows]] | Sequence[Rows]) -> NDArray[np.int64]:
    """How many of its choices (K, D) each picture (D,) finds at least as like as the first, its caption: 0 is best."""
    similar = [np.asarray(rows) @ picture for picture, rows in zip(pictures, chosen, strict=True)]
    return np.array([int((row[1:] >= row[0]).sum()) for row in similar], dtype=np.int64)


def told_apart(right: Rows, wrong: Rows) -> NDArray[np.bool_]:
    """Where the true caption's cosine exceeds that of the swapped one."""
    return np.asarray(right > wrong)


def kind_of_swap(caption: str, swap: str) -> Kind:
    """Whether a swap exchanges where things are, or what they are like: by the words in which it differs."""
    true, false = words_of(caption), words_of(swap)
    if len(true) == len(false):
        differ = {word for pair in zip(true, false, strict=True) if pair[0] != pair[1] for word in pair}
    else:
        differ = set(true) ^ set(false)
    return "relation" if differ & PLACES else "attribute"


def clip_score(pictures: Rows, texts: Rows) -> float:
    """100 · mean(max(cosine, 0)) of pictures and their texts (Hessel et al. 2021, equation 1, without its 2.5)."""
    cosines = np.sum(np.asarray(pictures, np.float64) * np.asarray(texts, np.float64), axis=1)
    return float(100 * np.maximum(cosines, 0).mean())
