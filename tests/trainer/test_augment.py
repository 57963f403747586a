"""Augmentation that keeps captions true, and captions made false."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.augment import keywords, names_side, swapped_captions, vary_caption, vary_pictures
from trainer.config import Augmentation

STILL = Augmentation(
    crop=1, stretch=0, brightness=0, saturation=0, tint=0, coarse=0, noise=0, mirror=0, frame=0, drop_parts=0
)


def two_halves(count: int) -> torch.Tensor:
    """Red on the left, blue on the right."""
    pictures = torch.zeros(count, 3, 36, 36, dtype=torch.uint8)
    pictures[:, 0, :, :18], pictures[:, 2, :, 18:] = 255, 255
    return pictures


def sided(count: int) -> torch.Tensor:
    """Captions that all name a side."""
    return torch.ones(count, dtype=torch.bool)


def test_nothing_varies_when_told_so() -> None:
    out = vary_pictures(two_halves(3), (36, 36), STILL, torch.Generator().manual_seed(0), sided(3))
    assert torch.equal(out, two_halves(3))


def test_left_stays_left_and_colours_stay() -> None:
    out = vary_pictures(
        two_halves(200), (32, 32), Augmentation(frame=0), torch.Generator().manual_seed(0), sided(200)
    ).float()
    left, right = out[:, :, :, :8].mean(dim=(2, 3)), out[:, :, :, -8:].mean(dim=(2, 3))
    assert out.shape == (200, 3, 32, 32)
    assert (left[:, 0] > 180).all() and (left[:, 2] < 60).all()
    assert (right[:, 2] > 180).all() and (right[:, 0] < 60).all()


def test_only_pictures_whose_caption_names_no_side_are_mirrored() -> None:
    how = STILL.model_copy(update={"mirror": 1.0})
    told = torch.tensor([names_side("a cat left of a dog"), names_side("Left, arrow"), names_side("a cleft chin")])
    out = vary_pictures(two_halves(3), (36, 36), how, torch.Generator().manual_seed(0), told)
    assert torch.equal(out[:2], two_halves(2)) and torch.equal(out[2], two_halves(1)[0].flip(2))


def test_frames_are_plain_at_most_a_tenth_wide_and_as_many_as_asked_for() -> None:
    how = STILL.model_copy(update={"frame": 0.5})
    out = vary_pictures(two_halves(400), (36, 36), how, torch.Generator().manual_seed(0), sided(400))
    changed = (out != two_halves(400)).any(dim=1)
    assert not changed[:, 4:-4, 4:-4].any()
    framed = changed.flatten(1).any(dim=1)
    assert 0.35 < framed.float().mean() < 0.55  # of the half, those thinner than half a pixel show nothing
    corners = out[framed][:, :, 0, 0]
    assert (corners == corners[:, :1]).all()
    assert 0.4 < (corners[:, 0] == 255).float().mean() < 0.6


def test_the_same_generator_state_gives_the_same_pictures() -> None:
    pictures = two_halves(5)
    one, other, third = (
        vary_pictures(pictures, (32, 32), Augmentation(), torch.Generator().manual_seed(seed), ~sided(5))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_keywords_are_dropped_and_reordered_sentences_are_not() -> None:
    rng = np.random.default_rng(0)
    keywords = {vary_caption("owl, bird, animal, night", 1.0, rng) for _ in range(200)}
    assert len(keywords) > 10
    assert all(set(text.split(", ")) <= {"owl", "bird", "animal", "night"} for text in keywords)
    assert all(
        vary_caption("a red circle, blue background", 1.0, rng) == "a red circle, blue background" for _ in range(9)
    )
    assert all(vary_caption("owl, bird, animal", 0.0, rng) == "owl, bird, animal" for _ in range(9))


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("owl, bird, coat of arms", 3),
        ("The owl of the north and its nest, owl, bird, night", 4),
        ("a dog, left of a cat, and a bird", 0),
        ("Can only move forward, back, left or right, but not diagonally.", 0),
        ("a red circle, blue background", 0),
        ("owl,, bird, ", 0),
    ],
)
def test_keywords_are_told_from_sentences(caption: str, parts: int) -> None:
    assert len(keywords(caption)) == parts
    assert (vary_caption(caption, 1.0, np.random.default_rng(1)) == caption) == (parts == 0)


@pytest.mark.parametrize("said", ["East wind", "7 o'clock", "crescent moon", "Flags", "letter B", "counterclockwise"])
def test_what_has_a_side_without_naming_it_is_known(said: str) -> None:
    assert names_side(said)


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        (
            "a red circle left of a blue square",
            ["a blue circle left of a red square", "a red circle right of a blue square"],
        ),
        ("Small cat, large dog", ["large cat, small dog"]),
        ("a dog above a cat", ["a dog below a cat"]),
        ("a red and a red thing", []),
        ("the greenhouse effect", []),
        ("owl, black, bird, white", []),  # keywords, in another order
        ("arrow, left, black, white", ["arrow, right, black, white"]),
        ("a black and white cat", []),
        ("left and right arrow", []),
        ("a black-and-white cat on a red/green rug", []),
        ("a large dog and a big cat", []),
        ("a large dog, a big cat and a tiny bird", ["a tiny dog, a big cat and a large bird"]),
        ("a red ball and a blue box", ["a blue ball and a red box"]),
    ],
)
def test_swapped_captions(caption: str, swapped: list[str]) -> None:
    assert swapped_captions(caption) == swapped
