"""R-precision, swaps and CLIP score on cases whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.matching import AMONG, choices, clip_score, kind_of_swap, ranks, told_apart


def test_choices_hold_the_caption_its_swaps_and_others() -> None:
    pool = [f"caption {number}" for number in range(150)] * 2
    swaps = [["swap a", "swap b"], ["caption 7"], []]
    rows = choices(pool[:3], swaps, pool, seed=0)
    for row, caption, wrong in zip(rows, pool, swaps, strict=False):
        assert row[: 1 + len(wrong)] == [caption, *wrong]
        assert len(row) == len(set(row)) == AMONG
    assert choices(pool[:3], swaps, pool, seed=0) == rows != choices(pool[:3], swaps, pool, seed=1)
    assert sorted(choices(["a"], [["b"]], ["a", "b", "c"], seed=0)[0]) == ["a", "b", "c"]


def test_r_precision_on_a_constructed_case() -> None:
    """Picture k has its own axis; three of four texts lie on theirs, the fourth loses to a swap."""
    pictures = np.eye(4, dtype=np.float32)
    own = pictures.copy()
    own[3] = [0, 0, 0.8, 0.6]
    swap = np.array([0, 0, 0, 1], np.float32)
    chosen = [np.stack([own[k], *(own[j] for j in range(4) if j != k), swap * (k == 3)]) for k in range(4)]
    found = ranks(pictures, chosen)
    assert found.tolist() == [0, 0, 0, 1]
    assert (found == 0).mean() == 0.75


def test_a_tie_is_no_success() -> None:
    picture = np.array([[1.0, 0.0]])
    same = np.array([[0.5, 0.1], [0.5, 0.3]])
    assert ranks(picture, [same]).tolist() == [1]
    assert told_apart(np.array([0.5, 0.6]), np.array([0.5, 0.5])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("caption", "swap", "kind"),
    [
        ("a red circle left of a blue star", "a blue circle left of a red star", "attribute"),
        ("a small dog beside a large cat", "a large dog beside a small cat", "attribute"),
        ("a red circle left of a blue star", "a red circle right of a blue star", "relation"),
        ("A cup directly above a plate.", "A cup beneath a plate.", "relation"),
        ("a ring at the top and a star at the bottom", "a ring at the bottom and a star at the top", "relation"),
        ("an orange star over a red ring", "a red star over an orange ring", "attribute"),
    ],
)
def test_kinds_of_swaps(caption: str, swap: str, kind: str) -> None:
    assert kind_of_swap(caption, swap) == kind


def test_clip_score() -> None:
    pictures = np.array([[1.0, 0.0], [1.0, 0.0]])
    texts = np.array([[0.6, 0.8], [-1.0, 0.0]])
    assert clip_score(pictures, texts) == pytest.approx(30)
