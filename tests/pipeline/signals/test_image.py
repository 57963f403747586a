"""The figures against values known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.signals import Picture, SignalOptions
from pipeline.signals.image import load, measure
from tests.pipeline.factory import picture


def grey(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(levels[:, :, None], 3, axis=2)


def test_one_colour() -> None:
    figures = measure(np.full((40, 30, 3), 51, np.uint8))
    expected = {"aspect": 4 / 3, "brightness": 0.2, "contrast": 0, "entropy": 0, "saturation": 0, "sharpness": 0}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["flat"] == 1 and figures["near_blank"]


def test_a_chessboard() -> None:
    levels = (np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    figures = measure(grey(levels))
    assert figures["entropy"] == pytest.approx(1)
    assert (figures["brightness"], figures["contrast"]) == pytest.approx((0.5, 0.5))
    assert figures["sharpness"] == pytest.approx((4 * 255) ** 2)  # the Laplacian is +-4 x 255, half each
    assert not figures["near_blank"]


def test_all_grey_levels_alike_are_eight_bits() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    figures = measure(grey(ramp))
    assert figures["entropy"] == pytest.approx(8)
    assert figures["contrast"] == pytest.approx(np.sqrt((256**2 - 1) / 12) / 255)  # of a discrete uniform
    assert figures["sharpness"] == 0  # a ramp has no second derivative
    assert figures["aspect"] == 16


def test_sharpness_is_the_laplacian_variance_of_scipy() -> None:
    image = picture(3)
    levels = np.asarray(image.convert("L")).astype(float)
    kernel = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    inside = ndimage.convolve(levels, kernel)[1:-1, 1:-1]
    assert measure(np.asarray(image))["sharpness"] == pytest.approx(inside.var())


def test_saturation() -> None:
    red, pale = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (255, 127, 127)))
    assert measure(red)["saturation"] == 1
    assert measure(pale)["saturation"] == pytest.approx(128 / 255, abs=1 / 255)


def test_near_blank_is_noise_but_not_a_small_mark_nor_two_colours_of_one_grey() -> None:
    rng = np.random.default_rng(0)
    blank = rng.integers(200, 203, (256, 256, 3)).astype(np.uint8)
    assert measure(blank)["near_blank"]
    marked = blank.copy()
    marked[100:115, 100:115] = 0
    assert not measure(marked)["near_blank"]
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = (100, 0, 0), (0, 51, 0)
    assert np.asarray(Image.fromarray(halves).convert("L")).std() < 1
    assert not measure(halves)["near_blank"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (2, 3)])
def test_tiny_pictures_have_figures(shape: tuple[int, int]) -> None:
    figures = measure(np.zeros((*shape, 3), np.uint8))
    assert figures["sharpness"] == 0 and figures["aspect"] == max(shape) / min(shape)


def test_columns_hold_the_error_of_what_was_not_decoded() -> None:
    signal = load(SignalOptions())
    seen = [signal.look(Picture({}, None, "corrupt: x")), signal.look(Picture({}, np.asarray(picture(0))))]
    table = signal.columns(seen)
    assert table.schema == signal.schema()
    failed, fine = table.to_pylist()
    assert failed.pop("decode_error") == "corrupt: x" and set(failed.values()) == {None}
    assert fine.pop("decode_error") is None and None not in fine.values()
