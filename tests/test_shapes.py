"""What the shapes benchmark counts as right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import shapes
from pipeline import clip as clips
from pipeline.miniweb.content import Object, Scene
from pipeline.miniweb.drawing import draw
from trainer.diffusion import add_noise, cosine

TRUE = "a large red star to the left of a small blue ring on a grey background"
FALSE_FIRST = TRUE.replace("star", "circle")
EXCHANGED = "a large red ring to the left of a small blue star on a grey background"


@pytest.mark.parametrize(
    ("caption", "stars", "circles", "rings", "exchanged"),
    [
        (TRUE, [True], [], [True], [True]),
        (FALSE_FIRST, [], [False], [True], [True]),
        (EXCHANGED, [False], [], [False], [False]),
    ],
)
def test_right_is_the_shape_that_is_there(
    caption: str, stars: list[bool], circles: list[bool], rings: list[bool], exchanged: list[bool]
) -> None:
    clip = clips.load("mini", "cpu")
    things = Object("star", "red", "large", "plain"), Object("ring", "blue", "small", "plain")
    picture = np.asarray(draw(Scene(things, "left of", "grey", 3)))
    found = shapes.told(clip, clip.encode_images([picture]), [caption])
    assert (found.objects["star"], found.objects["circle"], found.objects["ring"]) == (stars, circles, rings)
    assert found.small == [*stars, *circles, *rings] and found.exchanged == exchanged


def test_a_caption_of_one_shape_twice_has_no_exchange() -> None:
    clip = clips.load("mini", "cpu")
    found = shapes.told(clip, np.zeros((1, clip.dimension), np.float32), ["a red star above a blue star"])
    assert found.objects["star"] == [False, False]  # nothing is told by a vector of zeros
    assert not found.exchanged and not found.small
    assert found.line() == "right 0.000 of 2  star 0.000 of 2"


def test_words_are_put_in_their_places() -> None:
    one, other = shapes.NAMED.finditer("a star above a ring")
    assert shapes.instead("a star above a ring", [(one, "crescent"), (other, "star")]) == "a crescent above a star"


def test_a_perfect_decoder_redraws_the_true_picture_from_its_noised_self() -> None:
    noise = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    small = noise.flip(0).clamp(-1, 1)
    seen = []

    def perfect(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((xt, t))
        return small

    torch.testing.assert_close(shapes.redrawn(perfect, small, noise, 304), small)
    first, t = seen[0]
    assert t.tolist() == [304, 304] and seen[-1][1].tolist() == [0, 0]
    torch.testing.assert_close(first, add_noise(cosine(), small, t, noise))
