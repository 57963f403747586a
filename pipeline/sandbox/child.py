"""The child's side: it reads picture bodies from a socket and answers with plain pixels or a reason.

Before the first body it goes into its jail. It ends when its parent does, because the socket ends (a death signal would
come from the parent's thread, and threads end early); CPU time per picture is bounded by itself. `pipeline.images` is
its other side.

A frame in is `op, length` and the body; a frame out is `header length, data length`, a JSON header and the data.
"""

from __future__ import annotations

import io
import json
import signal
import socket
import struct
import sys
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipeline.sandbox.decode import Pixels, Refused, decode, srgb_transform
from pipeline.sandbox.jail import confine

FRAME_IN = struct.Struct("<cI")
FRAME_OUT = struct.Struct("<II")
NORMALISE, DECODE = b"N", b"D"


def bmp(pixels: Pixels) -> tuple[bytes, Pixels]:
    """Header and rows of a 24-bit top-down BMP of BGR pixels; rows are padded to four bytes."""
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    if width * 3 % 4:
        rows = np.pad(rows, ((0, 0), (0, -(width * 3) % 4)))
    rows = np.ascontiguousarray(rows)
    sizes = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + rows.size, 0, 0, 54) + sizes, rows


def main(settings: dict[str, Any]) -> None:
    """Serve frames on standard input (a socket) until it ends."""
    link = socket.socket(fileno=0)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, before pixels are allocated
    _warm_up()
    confined = confine(settings["memory_mb"])
    link.sendall(json.dumps({"confined": confined}).encode() + b"\n")
    while True:
        head = _receive(link, FRAME_IN.size)
        if len(head) < FRAME_IN.size:
            return
        op, size = FRAME_IN.unpack(head)
        body = bytes(_receive(link, size))
        if len(body) < size:
            return
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])  # CPU seconds; SIGPROF ends the process
        header, parts = _answer(op, body, settings["max_pixels"], settings["max_aspect"])
        text = json.dumps(header).encode()
        link.sendall(FRAME_OUT.pack(len(text), sum(memoryview(part).nbytes for part in parts)) + text)
        for part in parts:
            link.sendall(part)


def _answer(op: bytes, body: bytes, max_pixels: int, max_aspect: float) -> tuple[dict[str, Any], list[Any]]:
    try:
        picture = decode(body, "BGR" if op == NORMALISE else "RGB", max_pixels, max_aspect)
        height, width, _ = picture.pixels.shape
        parts: list[Any] = list(bmp(picture.pixels)) if op == NORMALISE else [np.ascontiguousarray(picture.pixels)]
    except Refused as error:
        return {"error": str(error)}, []
    except MemoryError:
        return {"error": "memory"}, []
    facts = {"format": picture.format, "mode": picture.mode, "frames": picture.frames, "notes": picture.notes}
    return {"width": width, "height": height, **facts}, parts


def _receive(link: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = link.recv_into(view[got:])
        if not count:
            return data[:got]
        got += count
    return data


def _warm_up() -> None:
    """Load now what is otherwise loaded at first use, when files can no longer be opened."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DECODE_CODEC_CHOICE = "auto"
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # it may not start any
    Image.init()
    small = Image.new("RGB", (8, 8))
    for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG"):
        file = io.BytesIO()
        small.save(file, kind)
        decode(file.getvalue(), "RGB", 64, 1.0)
    srgb_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "RGB").apply(small)
    srgb_transform.cache_clear()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
