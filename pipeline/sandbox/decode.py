"""Hostile picture bytes to plain pixels: upright, 8 bits, sRGB, the first frame, over white. Or a reason why not.

Sizes are judged by the header, before pixels are allocated. It knows nothing of processes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # EXIF tag
MAX_PROFILE = 4 << 20  # bytes of an ICC profile that is used

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3)


class Refused(Exception):
    """The body is not a picture we take; the text is "code: detail"."""


@dataclass
class Picture:
    """A decoded body. `pixels` is in the asked channel order, upright; `frames` of 2 also stands for more."""

    pixels: Pixels
    format: str
    mode: str
    frames: int
    notes: list[str]


def decode(body: bytes, order: str, max_pixels: int, max_aspect: float) -> Picture:
    """Upright 8-bit pixels of the first frame over white; `order` is "RGB" or "BGR". Raises Refused."""
    if not body:
        raise Refused("empty")
    kind = sniff(body)
    if kind is None:
        raise Refused(f"not_an_image: starts with {body[:8]!r}")
    if kind == "JPEG":
        return _decode_jpeg(body, order, max_pixels, max_aspect)
    return _decode_other(kind, body, order, max_pixels, max_aspect)


def sniff(body: bytes) -> str | None:
    """Pillow's name of the format by the first bytes, or None for what is not on the list."""
    head = body[:32]
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and any(brand in body[8:64] for brand in (b"avif", b"avis")):
        return "AVIF"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    return "BMP" if head.startswith(b"BM") else None


def _check_size(width: int, height: int, max_pixels: int, max_aspect: float) -> None:
    if width < 1 or height < 1:
        raise Refused("corrupt: no pixels")
    if width * height > max_pixels:
        raise Refused(f"too_many_pixels: {width} x {height}")
    if max(width, height) > max_aspect * min(width, height):
        raise Refused(f"aspect: {width} x {height}")


def _decode_jpeg(body: bytes, order: str, max_pixels: int, max_aspect: float) -> Picture:
    """Strict libjpeg-turbo: anything it would only warn about (a bad Huffman code, data that ends early) is corrupt."""
    jpeg = _jpeg_facts(body)
    _check_size(jpeg.width, jpeg.height, max_pixels, max_aspect)
    if jpeg.components not in _JPEG_MODES:
        raise Refused(f"corrupt: {jpeg.components} components")
    four = jpeg.components == 4
    direct = not four and (not jpeg.profile or _is_srgb(jpeg.profile))
    try:
        pixels = simplejpeg.decode_jpeg(body, "CMYK" if four else order if direct else "RGB", strict=True)
    except (ValueError, KeyError) as error:
        if "subsampling" in str(error):  # a rare kind that libjpeg knows and TurboJPEG has no name for
            return _decode_other("JPEG", body, order, max_pixels, max_aspect)
        raise Refused(f"corrupt: {error}") from None
    if pixels.shape[:2] != (jpeg.height, jpeg.width):
        raise Refused("corrupt: two frame headers")
    notes: list[str] = []
    if not direct:
        source = Image.fromarray(255 - pixels if four and jpeg.adobe else pixels, "CMYK" if four else "RGB")
        pixels = _ordered(np.asarray(_to_srgb(source, jpeg.profile, notes)), order)
    pixels = _upright(pixels, _orientation(jpeg.exif, notes), notes)
    return Picture(pixels, "jpeg", _JPEG_MODES[jpeg.components], 1, notes)


_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass
class _Jpeg:
    """What the segments before the first scan say; `adobe` means that CMYK is stored inverted."""

    width: int = 0
    height: int = 0
    components: int = 0
    exif: bytes = b""
    profile: bytes = b""
    adobe: bool = False


def _jpeg_facts(body: bytes) -> _Jpeg:
    facts, chunks = _Jpeg(), list[tuple[int, bytes]]()
    for marker, start, end in _jpeg_segments(body):
        if marker in _FRAME_HEADERS and end - start >= 6:
            facts.height, facts.width, facts.components = struct.unpack_from(">HHB", body, start + 1)
        elif marker == 0xE1 and not facts.exif and body.startswith(b"Exif\0\0", start):
            facts.exif = body[start:end]
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
            chunks.append((body[start + 12], body[start + 14 : end]))
        elif marker == 0xEE and body.startswith(b"Adobe", start):
            facts.adobe = True
    facts.profile = b"".join(chunk for _, chunk in sorted(chunks))
    return facts


def _jpeg_segments(body: bytes) -> Iterator[tuple[int, int, int]]:
    """`(marker, payload start, payload end)` of whole segments up to the first start of scan."""
    at = 2
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker = body[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        length = int.from_bytes(body[at + 2 : at + 4], "big")
        if length < 2 or at + 2 + length > len(body):
            return
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def _decode_other(kind: str, body: bytes, order: str, max_pixels: int, max_aspect: float) -> Picture:
    try:
        if kind == "WEBP":
            _check_size(*_webp_size(body), max_pixels, max_aspect)  # Pillow allocates the canvas when it opens one
        elif kind == "PNG":
            _check_png(body, max_pixels, max_aspect)
        with Image.open(io.BytesIO(body), formats=[kind]) as image:
            _check_size(*image.size, max_pixels, max_aspect)
            mode = image.mode
            profile = image.info.get("icc_profile") or b""
            image.load()
            notes: list[str] = []
            pixels = np.asarray(_flat_rgb(image, profile, notes))
            pixels = _upright(_ordered(pixels, order), int(image.getexif().get(ORIENTATION, 1)), notes)
            return Picture(pixels, kind.lower(), mode, _frames(image), notes)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything over hostile bytes
        raise Refused(f"corrupt: {type(error).__name__} {error}"[:200]) from None


def _webp_size(body: bytes) -> tuple[int, int]:
    """Canvas of a WebP from its first chunk (RFC 9649); a file shorter than it says is corrupt."""
    if len(body) < 30 or int.from_bytes(body[4:8], "little") + 8 > len(body):
        raise Refused("corrupt: the file is shorter than its header says")
    first = body[12:16]
    if first == b"VP8X":
        return 1 + int.from_bytes(body[24:27], "little"), 1 + int.from_bytes(body[27:30], "little")
    if first == b"VP8L":
        bits = int.from_bytes(body[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[26:28], "little") & 0x3FFF, int.from_bytes(body[28:30], "little") & 0x3FFF


def _check_png(body: bytes, max_pixels: int, max_aspect: float) -> None:
    """Every chunk's CRC up to IEND (Pillow skips those of IDAT), and the size before anything is inflated."""
    width, height = struct.unpack(">II", body[16:24].ljust(8, b"\0"))
    _check_size(width, height, max_pixels, max_aspect)
    at = 8
    while at + 12 <= len(body):
        length = int.from_bytes(body[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(body):
            break
        if zlib.crc32(memoryview(body)[at + 4 : end]) != int.from_bytes(body[end : end + 4], "big"):
            raise Refused(f"corrupt: checksum of chunk {body[at + 4 : at + 8]!r}")
        if body[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise Refused("corrupt: the file ends before IEND")


def _frames(image: Image.Image) -> int:
    """1, or the count where the header has it; GIF and TIFF would have to be walked, so there 2 is "more than one"."""
    if image.format not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1))
    try:
        image.seek(1)
    except Exception:  # the end, or damage beyond the first frame, which is all that is used
        return 1
    return 2


def _flat_rgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """8-bit sRGB over white, of any mode Pillow decodes to."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
        profile = b""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colour = _to_srgb(rgba.convert("RGB"), profile, notes)
        white = Image.new("RGB", image.size, "white")
        white.paste(colour, mask=rgba.getchannel("A"))
        notes.append("transparency")
        return white
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile, notes)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits (0 to 65535 → 0 to 255), of integers within that, or of floats from 0 to 1, as 8 bits."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not 0.0 <= low <= high <= 1.0:
            raise Refused("corrupt: float pixels outside 0 to 1")
        grey = np.rint(values * 255.0)
    elif low < 0 or high > 65535:
        raise Refused("corrupt: integer pixels outside 0 to 65535")
    else:
        grey = values if image.mode == "I" and high <= 255 else np.rint(values.astype(np.float32) / 257.0)
    result = Image.fromarray(grey.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        result.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return result


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """RGB by the ICC profile where it fits the picture's channels and is not sRGB already, else by Pillow's rule."""
    kinds = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
    fits = 128 < len(profile) <= MAX_PROFILE and kinds.get(profile[16:20]) == image.mode
    if fits and not _is_srgb(profile):
        try:
            converted = srgb_transform(profile, image.mode).apply(image)
            notes.append("icc")
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append("icc ignored")
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=8)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, target, mode, "RGB")


def _is_srgb(profile: bytes) -> bool:
    """By name: cameras and editors embed a few dozen variants of sRGB, all called so."""
    head = profile[:4096]
    return b"sRGB" in head or b"s\0R\0G\0B" in head


def _orientation(exif: bytes, notes: list[str]) -> int:
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif)
        return int(tags.get(ORIENTATION, 1))
    except Exception:  # EXIF is a TIFF inside the picture, as hostile as the rest
        notes.append("exif ignored")
        return 1


def _upright(pixels: Pixels, orientation: int, notes: list[str]) -> Pixels:
    """Undo EXIF orientation 2 to 8 (mirror, half turn, ... as CIPA DC-008 table 5 lists them)."""
    if not 2 <= orientation <= 8:
        return pixels
    notes.append(f"orientation {orientation}")
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _ordered(pixels: Pixels, order: str) -> Pixels:
    return pixels if order == "RGB" else pixels[:, :, ::-1]
