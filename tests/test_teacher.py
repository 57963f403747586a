"""What a network that knows ImageNet takes pictures for."""

from __future__ import annotations

import numpy as np

from benchmarks.teacher import GUESSES, LITE, _efficientnet, guesses, rounded


def test_pictures_are_taken_for_what_their_features_say() -> None:
    """One picture for every class, with features along its row of the classifier."""
    features = np.maximum(_efficientnet().classifier.weight.detach().numpy(), 0)
    features *= 30 / np.linalg.norm(features, axis=1, keepdims=True)
    taught = np.zeros((1000, 2304), np.float16)
    taught[:, :LITE] = np.sqrt(features)
    found = guesses(taught)
    assert all(len(names) == GUESSES for names in found)
    first = [max(set(names), key=names.count) for names in found]
    assert first[:2] == ["tench", "goldfish"] and first[2] == "great white shark" and len(set(first)) > 900
    alone = guesses(taught[[0, 0, 500, 500]])
    assert alone[0] == alone[1] != alone[2] == alone[3]


def test_parts_are_rounded_to_whole_numbers_of_the_same_sum() -> None:
    parts = np.array([[1.5, 0.2, 2.3], [0.4, 0.35, 0.25], [3.0, 0.0, 0.0], [0.9, 0.9, 1.2]])
    assert rounded(parts).tolist() == [[2, 0, 2], [1, 0, 0], [3, 0, 0], [1, 1, 1]]
