"""Views of drawings: what their captions tell stays true."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from benchmarks import views

GROUND = (230, 230, 230)


def drawing(colour: tuple[int, int, int]) -> Image.Image:
    """A disc left of the middle."""
    picture = Image.new("RGB", (200, 200), GROUND)
    ImageDraw.Draw(picture).ellipse((20, 60, 90, 130), fill=colour)
    return picture


def middle_hue(pixels: np.ndarray) -> int:
    """Hue of what is most coloured."""
    hue, saturation, _ = np.asarray(Image.fromarray(pixels).convert("HSV")).transpose(2, 0, 1)
    return int(np.median(hue[saturation > 150]))


def test_views_are_the_same_again_and_another_seed_gives_others() -> None:
    pictures, captions = [drawing((200, 0, 0)), drawing((0, 0, 200))], ["an apple", "a berry"]
    first, again, other = (list(views.views(pictures, captions, 12, seed)) for seed in (1, 1, 2))
    assert all(a.shape == (views.SIDE, views.SIDE, 3) and a.dtype == np.uint8 for a, _ in first)
    assert all(np.array_equal(a, b) and told == said for (a, told), (b, said) in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_a_caption_names_what_is_shown_and_no_drawing_is_joined_with_its_own_name() -> None:
    pictures = [drawing((200, 0, 0)), drawing((0, 0, 200)), drawing((0, 200, 0))]
    found = [told for _, told in views.views(pictures, ["an apple", "a berry", "a berry"], 200, seed=3)]
    assert set(found) == {"an apple", "a berry", "an apple, a berry", "a berry, an apple"}
    assert 30 < sum("," in told for told in found) < 80


def test_a_colour_that_is_told_stays() -> None:
    rng = np.random.default_rng(0)
    red = Image.new("RGB", (200, 200), (220, 0, 0))
    for caption in ("a red disc", "arrow-down-Red", "flag of somewhere", "golden"):
        assert all(min(hue := middle_hue(views.distorted(red, caption, rng)), 255 - hue) < 8 for _ in range(30))
    assert len({middle_hue(views.distorted(red, "a disc", rng)) for _ in range(30)}) > 10


def test_a_side_that_is_told_stays() -> None:
    rng = np.random.default_rng(0)
    brighter_on_the_right = Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (200, 1))).convert("RGB")

    def rightwards(caption: str) -> int:
        shown = (views.distorted(brighter_on_the_right, caption, rng) for _ in range(60))
        return sum(view[:, 100:].mean() > view[:, :44].mean() for view in shown)

    assert rightwards("light from the right") == 60
    assert 15 < rightwards("light") < 45


def test_two_drawings_in_one_picture_show_both() -> None:
    rng = np.random.default_rng(4)
    one, other = (
        np.full((views.SIDE, views.SIDE, 3), colour, np.uint8) for colour in ((250, 200, 200), (200, 200, 250))
    )
    seen = set()
    for _ in range(40):
        colours = np.unique(views.joined(one, other, rng).reshape(-1, 3), axis=0)
        seen.add("both" if len(colours) == 2 else "product" if colours.max() < 200 else "mean")
        assert len(colours) == 1 or colours.tolist() == [[200, 200, 250], [250, 200, 200]]
        assert len(colours) == 2 or (colours[0] < 250).all()
    assert seen == {"both", "product", "mean"}
