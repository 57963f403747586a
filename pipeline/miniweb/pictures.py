"""Pictures as files: a scene, edited, encoded in one of the web's many forms, and damaged where that is planned.

Equal `Picture` values give equal bytes for one version of Pillow. What a file is called, and how it travels, is
not known here.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from pipeline.miniweb.content import Scene, generator
from pipeline.miniweb.drawing import draw
from pipeline.miniweb.scenes import scene as any_scene

_TRANSPOSE = Image.Transpose
# Storing a picture under an EXIF orientation takes the inverse of what a reader does to show it.
_STORED = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_90,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_270,
}


@dataclass(frozen=True)
class Picture:
    """A scene as a file; `form` is a key of `TYPES`, `edit` of `EDITS`, `damage` of `DAMAGES`.

    `amounts` are the edit's numbers; `orientation` is EXIF's, 1 to 8, for JPEG.
    """

    scene: Scene
    side: int = 224
    form: str = "jpeg"
    quality: int = 88
    orientation: int = 1
    edit: str = ""
    amounts: tuple[float, ...] = ()
    damage: str = ""


def encode(picture: Picture) -> bytes:
    """The file's bytes."""
    image = draw(picture.scene, picture.side)
    if picture.edit:
        image = EDITS[picture.edit](image, *picture.amounts)
    data = _file(image, picture)
    return DAMAGES[picture.damage](data) if picture.damage else data


# ----------------------------------------------------------------------------------------------- edits


def _resize(image: Image.Image, ratio: float) -> Image.Image:
    side = round(image.width * ratio)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _crop(image: Image.Image, left: float, top: float, share: float) -> Image.Image:
    """Cut `share` of the width and height away; `left` and `top` (0..1) say how much of it at those sides."""
    gone = round(image.width * share)
    x, y, side = round(gone * left), round(gone * top), image.width - gone
    return image.crop((x, y, x + side, y + side))


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _tint(image: Image.Image, red: float, green: float, blue: float, share: float) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, (int(red), int(green), int(blue))), share)


def _stretch(image: Image.Image, width: float, height: float) -> Image.Image:
    """The picture small, in the middle of a banner of that size."""
    banner = image.resize((1, 1), Image.Resampling.BOX).resize((int(width), int(height)))
    side = min(banner.size)
    banner.paste(image.resize((side, side)), ((banner.width - side) // 2, (banner.height - side) // 2))
    return banner


def _blank(image: Image.Image, level: float) -> Image.Image:
    """Nothing but one shade and a noise of one step."""
    noise = generator("blank", int(level)).integers(0, 2, (image.height, image.width, 1))
    return Image.fromarray((noise + int(level)).repeat(3, axis=2).astype(np.uint8))


EDITS: dict[str, Callable[..., Image.Image]] = {
    "resize": _resize,
    "crop": _crop,
    "brightness": _brightness,
    "saturation": _saturation,
    "tint": _tint,
    "stretch": _stretch,
    "blank": _blank,
}

# ----------------------------------------------------------------------------------------------- forms

TYPES = {
    "jpeg": "image/jpeg",
    "jpeg_progressive": "image/jpeg",
    "jpeg_cmyk": "image/jpeg",
    "jpeg_grey": "image/jpeg",
    "png": "image/png",
    "png_16bit": "image/png",
    "png_grey16": "image/png",
    "png_palette": "image/png",
    "png_transparent": "image/png",
    "png_animated": "image/png",
    "gif": "image/gif",
    "gif_animated": "image/gif",
    "webp": "image/webp",
    "webp_animated": "image/webp",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
}


def _file(image: Image.Image, picture: Picture) -> bytes:
    form, container = picture.form, TYPES[picture.form].partition("/")[2]
    if form == "png_16bit":
        return _png16(np.asarray(image))
    if form == "png_grey16":
        return _png16(np.asarray(image.convert("L"))[..., None])
    options: dict[str, Any] = {}
    if container == "jpeg":
        options = {"quality": picture.quality, "progressive": form == "jpeg_progressive"}
        image = image.convert({"jpeg_cmyk": "CMYK", "jpeg_grey": "L"}.get(form, "RGB"))
        if picture.orientation != 1:
            image, exif = image.transpose(_STORED[picture.orientation]), Image.Exif()
            exif[0x0112] = picture.orientation
            options["exif"] = exif
    elif container == "webp":
        options = {"quality": picture.quality, "method": 2}
    elif form == "png_transparent":
        image = _with_clear_frame(image)
    elif form == "png_palette" or container == "gif":
        image = image.quantize(128, method=Image.Quantize.MEDIANCUT)
    if form.endswith("_animated"):
        options |= {
            "save_all": True,
            "append_images": _other_frames(picture, image.mode),
            "duration": 200,
            "loop": 0,
        }
    buffer = io.BytesIO()
    image.save(buffer, container.upper(), **options)
    return buffer.getvalue()


def _other_frames(picture: Picture, mode: str) -> list[Image.Image]:
    """Two more frames; they show other scenes, so only the first fits the caption."""
    frames = [draw(any_scene(picture.scene.seed, k), picture.side) for k in range(2)]
    return [frame.quantize(128) if mode == "P" else frame for frame in frames]


def _with_clear_frame(image: Image.Image) -> Image.Image:
    """RGBA, see-through along its edges, with noise as the colour under the clear pixels."""
    pixels = np.asarray(image.convert("RGBA")).copy()
    edge = max(1, image.width // 20)
    clear = np.ones(pixels.shape[:2], bool)
    clear[edge:-edge, edge:-edge] = False
    pixels[clear, :3] = generator("clear").integers(0, 256, (int(clear.sum()), 3), dtype=np.uint8)
    pixels[clear, 3] = 0
    return Image.fromarray(pixels)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, packed: bytes) -> bytes:
    """A PNG around compressed scan lines, whatever size it declares (PNG specification, 11.2)."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _png16(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """[height, width, 1 or 3] bytes as a PNG of 16 bits a sample."""
    height, width, channels = pixels.shape
    lines = (pixels.astype(">u2") * 257).astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), lines], axis=1)
    return png(width, height, 16, 2 if channels == 3 else 0, zlib.compress(filtered.tobytes(), 6))


# --------------------------------------------------------------------------------------------- damages


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _scribble(data: bytes) -> bytes:
    """Random bytes, JPEG markers among them, over a stretch in the middle."""
    start, length = int(len(data) * 0.4), 240
    noise = generator("scribble", len(data)).integers(0, 256, length, dtype=np.uint8).tobytes()
    return data[:start] + noise + 2 * b"\xff\xd3\xff\xd6" + data[start + length + 8 :]


def _no_tables(data: bytes) -> bytes:
    """A JPEG whose Huffman tables (marker DHT, FFC4) are unreadable."""
    return data.replace(b"\xff\xc4", b"\xff\xc4\x00\x01", 1)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": partial(_cut, share=0.55),
    "scribble": _scribble,
    "no_tables": _no_tables,
}

# ----------------------------------------------------------------------------------- fixed other bodies


@lru_cache(maxsize=1)
def claimed_bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 by 60,000 pixels."""
    return png(60_000, 60_000, 8, 2, zlib.compress(bytes(200_000), 9))


@lru_cache(maxsize=1)
def real_bomb() -> bytes:
    """A whole, valid PNG of 30,000 by 30,000 one-bit pixels: 0.1 MB as a file, 900 million pixels as a picture."""
    packer = zlib.compressobj(9)
    line = bytes(1 + 30_000 // 8)
    packed = b"".join(packer.compress(line * 1000) for _ in range(30)) + packer.flush()
    return png(30_000, 30_000, 1, 0, packed)
