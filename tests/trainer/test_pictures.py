"""Pictures and masks of a user, PNG files and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.base import HeadraceError
from trainer.pictures import CELL, GAP, LABEL, grid, read_mask, read_picture, write_png

RED = np.full((10, 20, 3), (255, 0, 0), np.uint8)


def test_a_png_comes_back_with_its_notes(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", RED, {"text": "ein größeres Quadrat", "seed": "3"})
    assert np.array_equal(read_picture(tmp_path / "a.png"), RED)
    assert Image.open(tmp_path / "a.png").text == {"text": "ein größeres Quadrat", "seed": "3"}  # type: ignore[attr-defined]


def test_pictures_are_upright_and_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.fromarray(RED).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (20, 10, 3)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    Image.new("P", (4, 4)).save(tmp_path / "palette.gif")
    assert read_picture(tmp_path / "palette.gif").shape == (4, 4, 3)


def test_grey_of_16_bits_is_read_whole_and_of_32_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("ramp.png", "ramp.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name)[..., 1], np.arange(256).reshape(16, 16))
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "float.tiff")
    with pytest.raises(HeadraceError, match=r"float\.tiff holds numbers of which none") as caught:
        read_picture(tmp_path / "float.tiff")
    assert "PNG" in str(caught.value.hint)


def test_what_is_no_picture_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("<html>")
    write_png(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8), {})
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    for name, code, word in (("none.png", 3, "no picture"), ("text.png", 2, "no picture"), ("cut.png", 2, "read")):
        with pytest.raises(HeadraceError, match=word) as caught:
            read_picture(tmp_path / name)
        assert name in caught.value.message and caught.value.code == code and caught.value.hint
    with pytest.raises(HeadraceError):
        read_picture(tmp_path)


def test_a_mask_is_black_and_white(tmp_path: Path) -> None:
    painted = np.zeros((10, 20), bool)
    painted[3:6, 4:9] = True
    for name in ("mask.png", "mask.jpg"):
        Image.fromarray(painted.astype(np.uint8) * 255).save(tmp_path / name, quality=95)
    assert np.array_equal(read_mask(tmp_path / "mask.png", (10, 20)), painted)
    assert read_mask(tmp_path / "mask.jpg", (10, 20))[4, 6]


def test_a_picture_is_no_mask(tmp_path: Path) -> None:
    write_png(tmp_path / "red.png", RED, {})
    with pytest.raises(HeadraceError, match=r"red\.png is no mask: 100% of its pixels") as caught:
        read_mask(tmp_path / "red.png", (10, 20))
    assert caught.value.code == 2 and "white where to paint" in str(caught.value.hint)


def test_a_mask_has_the_size_of_its_picture(tmp_path: Path) -> None:
    write_png(tmp_path / "mask.png", np.zeros((10, 20, 3), np.uint8), {})
    with pytest.raises(HeadraceError, match="20×10, the picture 64×32"):
        read_mask(tmp_path / "mask.png", (32, 64))


def test_grid_puts_every_picture_in_its_cell() -> None:
    colours = [np.full((16, 16, 3), value, np.uint8) for value in (10, 60, 110, 160)]
    sheet = grid([colours[:2], colours[2:]], ["first", "a label of many words " * 20], ["one", "two" * 90])
    middle = LABEL + GAP + CELL // 2
    y = sheet.shape[0] - 2 * (CELL + GAP)
    for line in range(2):
        for column in range(2):
            value = sheet[y + line * (CELL + GAP) + CELL // 2, middle + column * (CELL + GAP)]
            assert (value == 10 + 100 * line + 50 * column).all()
    assert (sheet[:, :LABEL] < 128).any() and sheet.shape[1] == LABEL + GAP + 2 * (CELL + GAP)
    assert not (sheet[:y, LABEL + GAP + 2 * CELL + 2 * GAP :] < 255).any()


def test_grid_of_one_large_picture() -> None:
    assert grid([[np.zeros((300, 200, 3), np.uint8)]], [""]).shape == (2 * GAP + 300, LABEL + 2 * GAP + 300, 3)
