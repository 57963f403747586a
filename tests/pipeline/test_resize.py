"""What is stored of a picture, and that a JPEG is kept byte for byte only when there is nothing to change."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from pipeline.images import ImageSandbox
from pipeline.resize import ImageConfig, encode, is_bare_jpeg, limits, may_stay, resizer
from tests.pipeline.factory import jpeg, picture


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ImageSandbox]:
    with ImageSandbox(limits(ImageConfig(), 10_000_000)) as box:
        yield box


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


PLAIN = picture(1)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_a_bare_jpeg_stays(sandbox: ImageSandbox, options: dict[str, Any]) -> None:
    body = saved(PLAIN, **options)
    assert is_bare_jpeg(body)
    stored, *sizes, error = encode(resizer(ImageConfig()), ImageConfig(), body, sandbox.normalise(body))
    assert (stored, sizes, error) == (body, [96, 96, 96, 96], None)


@pytest.mark.parametrize(
    "body",
    [
        saved(PLAIN, exif=exif(1)),
        saved(PLAIN, exif=exif(6)),
        saved(PLAIN, comment=b"made by"),
        saved(PLAIN, xmp=b"<x:xmpmeta/>"),
        saved(PLAIN, icc_profile=b"sRGB" * 100),
        saved(PLAIN) + b"trailing",
        saved(PLAIN.convert("L")),
        saved(PLAIN.convert("CMYK")),
        saved(picture(2, 300)),
        saved(PLAIN, "PNG"),
        saved(PLAIN, "WEBP"),
    ],
)
def test_anything_else_is_encoded_anew_and_bare(sandbox: ImageSandbox, body: bytes) -> None:
    config, seen = ImageConfig(), sandbox.normalise(body)
    assert not may_stay(config, body, seen)
    stored, width, height, _, _, error = encode(resizer(config), config, body, seen)
    assert error is None
    assert stored is not None
    assert is_bare_jpeg(stored)
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.size, image.mode) == ((width, height), "RGB")
        assert max(image.size) <= 256
        assert not image.getexif()


def test_orientation_is_undone_before_sizes_are_told(sandbox: ImageSandbox) -> None:
    body = saved(Image.new("RGB", (400, 200)), exif=exif(6))
    _, *sizes, _ = encode(resizer(ImageConfig()), ImageConfig(), body, sandbox.normalise(body))
    assert sizes == [128, 256, 200, 400]


@pytest.mark.parametrize(
    ("mode", "size"), [("keep_ratio_largest", (64, 32)), ("keep_ratio", (128, 64)), ("center_crop", (64, 64))]
)
def test_modes(sandbox: ImageSandbox, mode: str, size: tuple[int, int]) -> None:
    config = ImageConfig.model_validate({"image_size": 64, "resize_mode": mode})
    body = jpeg(Image.new("RGB", (400, 200), "red"))
    _, width, height, *_ = encode(resizer(config), config, body, sandbox.normalise(body))
    assert (width, height) == size


def test_what_the_sandbox_refuses_is_no_picture(sandbox: ImageSandbox) -> None:
    for body, code in ((b"<html>", "not_an_image"), (b"", "empty"), (jpeg(PLAIN)[:500], "corrupt")):
        stored, *_, error = encode(None, ImageConfig(), body, sandbox.normalise(body))
        assert (stored, (error or "").split(":")[0]) == (None, code)
    assert not is_bare_jpeg(jpeg(PLAIN)[:-2])
    assert not is_bare_jpeg(b"\xff\xd8\xff\xd9"[:3])
