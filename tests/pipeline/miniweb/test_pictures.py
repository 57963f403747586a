"""Pictures as files: every form opens as what it claims and shows the scene, and every damage is one."""

from __future__ import annotations

import io
import zlib

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.miniweb.pictures import DAMAGES, TYPES, Picture, claimed_bomb, encode, real_bomb
from pipeline.miniweb.scenes import draw, scene

SHOWN = scene(1, 2)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("form", TYPES)
def test_every_form_is_what_it_says_and_shows_the_scene(form: str) -> None:
    data = encode(Picture(SHOWN, side=96, form=form))
    assert data == encode(Picture(SHOWN, side=96, form=form))
    image = opened(data)
    assert TYPES[form] == Image.MIME[str(image.format)]
    assert getattr(image, "n_frames", 1) == (3 if form.endswith("_animated") else 1)
    grey = form in ("jpeg_grey", "png_grey16")
    wanted = np.asarray(draw(SHOWN, 96).convert("L" if grey else "RGB")).astype(float)
    shown = (
        np.asarray(image).astype(float) / 257
        if form == "png_grey16"
        else np.asarray(image.convert("L" if grey else "RGB"))
    )
    inner = slice(8, -8)  # the clear frame of the transparent one is left out
    assert np.abs(shown.astype(float)[inner, inner] - wanted[inner, inner]).mean() < 12


def test_modes_are_the_awkward_ones() -> None:
    modes = {form: opened(encode(Picture(SHOWN, side=64, form=form))).mode for form in TYPES}
    assert modes["jpeg_cmyk"] == "CMYK" and modes["jpeg_grey"] == "L" and modes["png_grey16"].startswith("I;16")
    assert modes["png_palette"] == modes["gif"] == "P" and modes["png_transparent"] == "RGBA"
    assert encode(Picture(SHOWN, side=64, form="png_16bit"))[24] == 16


def test_sixteen_bits_hold_the_same_values() -> None:
    data = encode(Picture(SHOWN, side=32, form="png_16bit"))
    at = data.index(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    lines = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + size]), np.uint8).reshape(32, 1 + 32 * 6)
    samples = lines[:, 1:].copy().view(">u2").reshape(32, 32, 3)
    assert np.array_equal(samples, np.asarray(draw(SHOWN, 32)).astype(np.uint16) * 257)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_undoes_how_it_is_stored(orientation: int) -> None:
    image = opened(encode(Picture(SHOWN, side=96, orientation=orientation, quality=95)))
    upright = np.asarray(ImageOps.exif_transpose(image)).astype(float)
    wanted = np.asarray(draw(SHOWN, 96)).astype(float)
    assert np.abs(upright - wanted).mean() < 3
    assert np.abs(np.asarray(image).astype(float) - wanted).mean() > 6


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_jpegs_do_not_decode_strictly(damage: str) -> None:
    import simplejpeg

    for k in range(10):
        with pytest.raises(ValueError):
            simplejpeg.decode_jpeg(encode(Picture(scene(2, k), damage=damage)), strict=True)


@pytest.mark.parametrize("damage", ["cut", "scribble"])
def test_damaged_pngs_do_not_decode(damage: str) -> None:
    for k in range(5):
        with pytest.raises((OSError, SyntaxError)):
            opened(encode(Picture(scene(2, k), form="png", damage=damage)))


def test_bombs_are_small_and_claim_much() -> None:
    assert len(claimed_bomb()) < 1000 and len(real_bomb()) < 200_000
    for data, side in ((claimed_bomb(), 60_000), (real_bomb(), 30_000)):
        assert int.from_bytes(data[16:20], "big") == int.from_bytes(data[20:24], "big") == side


def test_edited_copies_are_near_and_other_scenes_far() -> None:
    def hashed(picture: Picture) -> imagehash.ImageHash:
        return imagehash.phash(opened(encode(picture)).convert("RGB"))

    originals = [hashed(Picture(scene(3, k), side=224)) for k in range(80)]
    assert min(a - b for k, a in enumerate(originals) for b in originals[:k]) > 6
    for k, own in enumerate(originals[:20]):
        for edit, amounts in (
            ("resize", (0.6,)),
            ("brightness", (1.1,)),
            ("saturation", (0.7,)),
            ("tint", (200, 60, 60, 0.08)),
        ):
            assert own - hashed(Picture(scene(3, k), side=224, edit=edit, amounts=amounts)) <= 8
        assert own - hashed(Picture(scene(3, k), side=224, edit="crop", amounts=(0.5, 0.5, 0.03))) <= 14
