"""How a picture is stored: its settings, img2dataset's resizer for them, and when a JPEG may stay as it came.

What comes in has been decoded by the sandbox; nothing here looks at hostile bytes beyond the segments of a JPEG.
"""

from __future__ import annotations

import io
import os
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipeline.base import Config

if TYPE_CHECKING:
    from pipeline.images import Limits, Normalised

Encoded = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class ImageConfig(Config):
    """How pictures are stored. A picture is never made larger."""

    encode_format: ClassVar[str] = "jpg"

    image_size: int = Field(256, ge=16, le=8192, description="pixels of the side that `resize_mode` bounds")
    resize_mode: Literal["keep_ratio_largest", "keep_ratio", "center_crop"] = Field(
        "keep_ratio_largest",
        description="bound the longer side, the shorter side, or the shorter side and crop to a square",
    )
    encode_quality: int = Field(95, ge=1, le=100, description="JPEG quality")
    max_aspect: float = Field(20.0, ge=1, description="long side over short side; a picture beyond it is not stored")
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of the source by its header; more is not decoded")
    seconds: float = Field(10.0, gt=0, description="time to decode one picture")
    memory_mb: int = Field(1024, ge=256, description="memory of a decoding process")


def limits(config: ImageConfig, max_bytes: int) -> Limits:
    """What the sandbox may spend on a picture."""
    from pipeline.images import Limits

    shared = config.model_dump(include={"max_pixels", "max_aspect", "seconds", "memory_mb"})
    return Limits(max_bytes=max_bytes, **shared)


def resizer(config: ImageConfig) -> Any:
    """img2dataset's `Resizer` for these settings."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=True,
        encode_quality=config.encode_quality,
        encode_format=config.encode_format,
    )


def encode(resizer: Any, config: ImageConfig, body: bytes, seen: Normalised) -> Encoded:
    """A picture as it is stored: bytes, width, height, original width and height (upright); or Nones and an error.

    `body` is the source, `seen` what the sandbox made of it; the error is "code" or "code: detail".
    """
    if seen.data is None:
        return None, None, None, None, None, seen.error
    if may_stay(config, body, seen):
        return body, seen.width, seen.height, seen.width, seen.height, None
    data, width, height, original_width, original_height, error = resizer(io.BytesIO(seen.data))
    if error is not None:
        return None, None, None, None, None, f"resize: {error}"
    return data, width, height, original_width, original_height, None


def may_stay(config: ImageConfig, body: bytes, seen: Normalised) -> bool:
    """Whether the source's bytes may be stored as they are, without another generation of JPEG loss.

    True for a decodable three-channel JPEG that is not too large, from which nothing had to be undone (orientation,
    colour profile), and that carries no metadata.
    """
    if seen.format != "jpeg" or seen.mode != "RGB" or seen.notes or seen.width is None or seen.height is None:
        return False
    side = (max if config.resize_mode == "keep_ratio_largest" else min)(seen.width, seen.height)
    return side <= config.image_size and is_bare_jpeg(body)


_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan: anything but a stuffed byte, a restart or a fill
_FRAMES = (0xC0, 0xC1, 0xC2)
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantisation, restart interval


def is_bare_jpeg(body: bytes) -> bool:
    """Whether a JPEG holds its picture and nothing else: no EXIF, XMP, profile, comment or thumbnail, nothing after it.

    Markers as in ITU T.81, table B.1. JFIF and Adobe segments of their fixed size stay: decoders need them.
    """
    at = 2
    if body[:2] != b"\xff\xd8":
        return False
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker, length = body[at + 1], int.from_bytes(body[at + 2 : at + 4], "big")
        jfif = marker == 0xE0 and length == 16 and body.startswith(b"JFIF\0", at + 4)
        adobe = marker == 0xEE and length == 14 and body.startswith(b"Adobe", at + 4)
        if not (jfif or adobe or marker in _FRAMES or marker in _TABLES or marker == 0xDA):
            return False
        at += 2 + length
        if marker == 0xDA:
            end = _SCAN_END.search(body, at)
            if end is None:
                return False
            at = end.start()
    return body[at:] == b"\xff\xd9"
