"""Figures of a CLIP from its vectors: retrieval, swaps, separation, and what its scale means.

Vectors are unit rows. Two rows with equal captions count as the same answer. It knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.clip import Clip
    from trainer.data import PackedSet, Pictures

GOOD_COSINE = 0.28
EVALUATED = 1000  # rows of a held-out set that are looked at during training


def share_within(similarity: NDArray[np.float32], captions: Sequence[str], first: int) -> float:
    """Share of pictures (rows) whose caption is among the `first` most similar texts (columns) of (N, N)."""
    import numpy as np

    names = np.unique(np.asarray(captions), return_inverse=True)[1]
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :first]
    return float((names[best] == names[:, None]).any(axis=1).mean())


def auc(right: NDArray[np.float32], wrong: NDArray[np.float32]) -> float:
    """Probability that a right pair scores above a wrong one, ties counted half (Mann-Whitney's U over n·m)."""
    import numpy as np

    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, side="left") + np.searchsorted(ordered, right, side="right")
    return float(below.mean() / 2 / len(wrong))


def other_caption(captions: Sequence[str]) -> NDArray[np.int64]:
    """For every row one with another caption: the next by position, fixed; needs two distinct captions."""
    import numpy as np

    names = np.unique(np.asarray(captions), return_inverse=True)[1]
    partner = np.arange(len(names))
    for shift in range(1, len(names)):
        same = names[partner] == names
        if not same.any():
            break
        partner[same] = (np.flatnonzero(same) + shift) % len(names)
    return partner


def pair_figures(
    images: NDArray[np.float32], texts: NDArray[np.float32], captions: Sequence[str], first: int
) -> dict[str, float]:
    """Retrieval among the rows, AUC against another row's caption, and where right and unrelated pairs lie."""
    import numpy as np

    right = np.sum(images * texts, axis=1)
    wrong = np.sum(images * texts[other_caption(captions)], axis=1)
    return {
        f"first_{first}": share_within(images @ texts.T, captions, first),
        "auc": auc(right, wrong),
        "right_mean": float(right.mean()),
        "unrelated_mean": float(wrong.mean()),
        "unrelated_std": float(wrong.std()),
        "right_above_0.28": float((right > GOOD_COSINE).mean()),
        "unrelated_above_0.28": float((wrong > GOOD_COSINE).mean()),
    }


def swap_share(
    clip: Clip, images: NDArray[np.float32], texts: NDArray[np.float32], swaps: Sequence[Sequence[str]]
) -> float | None:
    """Share of swapped captions that score below the true one; None where there are none."""
    import numpy as np

    rows = [row for row, wrong in enumerate(swaps) for _ in wrong]
    if not rows:
        return None
    vectors = clip.encode_texts([text for wrong in swaps for text in wrong])
    true = np.sum(images[rows] * texts[rows], axis=1)
    return float((true > np.sum(images[rows] * vectors, axis=1)).mean())


def held_out_figures(clip: Clip, packed: PackedSet, pictures: Pictures) -> dict[str, float]:
    """The figures of a held-out set, on its first rows with a caption, and how many those are.

    Without two different captions there is nothing to tell apart, and that number is all.
    """
    import numpy as np

    rows = np.array([row for row, text in enumerate(packed.captions) if text.strip()][:EVALUATED])
    captions = [packed.captions[row] for row in rows]
    if len(set(captions)) < 2:
        return {"rows": len(rows)}
    images = clip.encode_images(pictures.take(rows))
    texts = clip.encode_texts(captions)
    figures = pair_figures(images, texts, captions, first=10)
    swapped = swap_share(clip, images, texts, [packed.swaps[row] for row in rows])
    return {"rows": len(rows), **figures, **({} if swapped is None else {"true_above_swap": swapped})}
