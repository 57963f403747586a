"""Views of drawings in other looks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.looks import LOOKS, Look, looks, restyled
from benchmarks.views import SIDE


def drawing(colour: str) -> Image.Image:
    picture = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(picture).rectangle((20, 10, 180, 150), fill=colour)
    return picture


def test_so_many_views_with_their_captions_and_the_same_again() -> None:
    captions = ["a box", "a red box"]
    found, again, other = (list(looks([drawing("blue"), drawing("red")], captions, 12, seed)) for seed in (1, 1, 2))
    assert all(view.shape == (SIDE, SIDE, 3) and view.dtype == np.uint8 for view, _ in found)
    assert {part for _, caption in found for part in caption.split(", ")} == set(captions)
    assert [caption for _, caption in found] == [caption for _, caption in again]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, again, strict=True))
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, other, strict=True))


def test_colours_that_a_caption_tells_stay() -> None:
    red = np.zeros((SIDE, SIDE, 3), np.uint8) + np.array([200, 30, 40], np.uint8)
    rng = np.random.default_rng(0)

    def share_red(coloured: bool) -> float:
        means = [restyled(red, rng, coloured).mean(axis=(0, 1)) for _ in range(60)]
        return float(np.mean([r > 1.1 * max(g, b) for r, g, b in means]))

    assert share_red(True) == 1 > 0.8 > share_red(False)


@pytest.mark.parametrize("look", [look for look, _ in LOOKS], ids=lambda look: look.__name__)
def test_each_look_changes_a_view_and_keeps_its_size(look: Look) -> None:
    view = np.asarray(drawing("teal").resize((SIDE, SIDE)), np.float32) / 255
    changed = look(view, np.random.default_rng(3), False)
    assert changed.shape == view.shape and np.isfinite(changed).all()
    assert float(np.abs(np.clip(changed, 0, 1) - view).mean()) > 0.002
