"""Figures of a CLIP against known answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trainer.evaluate_clip import auc, held_out_figures, other_caption, pair_figures, share_within, swap_share


def test_auc_of_known_samples() -> None:
    right, wrong = np.array([3.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32)
    assert auc(right, wrong) == pytest.approx(3.5 / 4)  # of four pairs three are won and one is tied
    assert auc(wrong, right) == pytest.approx(0.5 / 4)
    rng = np.random.default_rng(0)
    shifted, plain = (rng.normal(mean, 1, 200_000).astype(np.float32) for mean in (1, 0))
    assert auc(shifted, plain) == pytest.approx(0.7602, abs=0.003)  # the normal distribution function at 1/sqrt(2)


def test_share_within_counts_equal_captions_as_one() -> None:
    similarity = np.array([[0.1, 0.9, 0.2], [0.5, 0.4, 0.9], [0.9, 0.8, 0.1]], np.float32)
    assert share_within(similarity, ["a", "b", "c"], 1) == 0
    assert share_within(similarity, ["a", "a", "c"], 1) == pytest.approx(1 / 3)
    assert share_within(similarity, ["a", "b", "c"], 3) == 1


def test_other_caption_is_never_an_equal_one() -> None:
    captions = ["x"] * 7 + ["y"] + ["z"] * 2
    partner = other_caption(captions)
    assert all(captions[row] != captions[int(other)] for row, other in enumerate(partner))


class Lettered:
    """A CLIP whose vector of a text is the axis of its first letter."""

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(26, dtype=np.float32)[[ord(text[0]) - ord("a") for text in texts]]

    def encode_images(self, pictures: list[str]) -> np.ndarray:
        return self.encode_texts(pictures)


def test_swaps_count_where_they_score_below_the_true_caption() -> None:
    clip: Any = Lettered()
    vectors = clip.encode_texts(["a", "b", "c"])
    assert swap_share(clip, vectors, vectors, [["x", "a"], [], ["y", "z"]]) == pytest.approx(3 / 4)  # a tie is none
    assert swap_share(clip, vectors[[1, 1, 1]], vectors, [["b"], ["x"], []]) == pytest.approx(1 / 2)
    assert swap_share(clip, vectors, vectors, [[], [], []]) is None


def test_held_out_figures_are_of_rows_with_captions_and_need_two() -> None:
    class Rows:
        def take(self, rows: np.ndarray) -> list[str]:
            return ["abcdef"[row] for row in rows]

    def figures(*captions: str) -> dict[str, float]:
        packed: Any = SimpleNamespace(captions=captions, swaps=((),) * len(captions))
        pictures: Any = Rows()
        clip: Any = Lettered()
        return held_out_figures(clip, packed, pictures)

    assert figures("a") == figures("", "b", " ") == {"rows": 1}
    found = figures("a", "", "c")
    assert found["rows"] == 2 and found["auc"] == 1 and found["unrelated_mean"] == 0


def test_perfect_vectors_give_perfect_figures() -> None:
    vectors = np.eye(12, dtype=np.float32)
    figures = pair_figures(vectors, vectors, [str(n) for n in range(12)], first=1)
    assert figures["first_1"] == figures["auc"] == figures["right_mean"] == figures["right_above_0.28"] == 1
    assert figures["unrelated_mean"] == 0
