"""The picture sandbox: every kind of picture comes out right, and hostile bytes cost one row and nothing else."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.images import ImageSandbox, Limits, Normalised

RED, BLUE = (254, 0, 0), (0, 0, 254)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ImageSandbox]:
    with ImageSandbox(Limits(max_pixels=4_000_000, seconds=8.0, memory_mb=512)) as sandbox:
        yield sandbox


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """Red left, blue right, a white top-left corner: no symmetry."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    pixels[: height // 2, : width // 4] = 255
    return Image.fromarray(pixels)


def as_opencv(result: Normalised) -> np.ndarray[Any, Any]:
    """What img2dataset's resizer will see, as RGB."""
    assert result.error is None and result.data is not None, result.error
    pixels = cv2.imdecode(np.frombuffer(result.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None and pixels.dtype == np.uint8 and pixels.shape == (result.height, result.width, 3)
    return pixels[:, :, ::-1]


def assert_close(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any], tolerance: float) -> None:
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want.astype(int)).mean() <= tolerance


LOSSES = {"PNG": 0, "BMP": 0, "TIFF": 0, "GIF": 1, "JPEG": 6, "WEBP": 6, "AVIF": 6}  # mean error of the format itself


@pytest.mark.parametrize("width", [48, 49, 50, 51])  # BMP rows are padded to four bytes
@pytest.mark.parametrize("kind", LOSSES)
def test_every_format_and_both_ways_out(sandbox: ImageSandbox, kind: str, width: int) -> None:
    source = scene(width)
    body = encoded(source, kind)
    result = sandbox.normalise(body)
    assert_close(as_opencv(result), np.asarray(source), LOSSES[kind])
    assert (result.format, result.frames) == (kind.lower(), 1)
    decoded = sandbox.decode(body)
    assert isinstance(decoded, np.ndarray)
    assert np.array_equal(decoded, as_opencv(result))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(sandbox: ImageSandbox, orientation: int, kind: str) -> None:
    from PIL.Image import Transpose as T

    # How a camera stores an upright scene, given the tag: the inverse of what a viewer has to do.
    stored = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90}
    stored |= {7: T.TRANSVERSE, 8: T.ROTATE_270}
    image = scene().transpose(stored[orientation]) if orientation > 1 else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    result = sandbox.normalise(encoded(image, kind, exif=exif, **options))
    assert_close(as_opencv(result), np.asarray(scene()), 3)
    assert (result.width, result.height) == (48, 32)


def test_sixteen_bits_are_scaled_not_clipped(sandbox: ImageSandbox) -> None:
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    want = np.rint(ramp / 257).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert_close(as_opencv(sandbox.normalise(encoded(Image.fromarray(ramp), kind))), want, 0.01)
    colour = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2)
    body = cv2.imencode(".png", colour[:, :, ::-1])[1].tobytes()
    assert_close(as_opencv(sandbox.normalise(body)), colour >> 8, 1)


def test_float_greyscale(sandbox: ImageSandbox) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    got = as_opencv(sandbox.normalise(encoded(Image.fromarray(ramp), "TIFF")))
    assert np.array_equal(got[:, :, 0].ravel(), np.arange(256))
    error = sandbox.normalise(encoded(Image.fromarray(ramp * 9), "TIFF")).error
    assert error is not None and error.startswith("corrupt")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_grey_and_palettes_become_rgb(sandbox: ImageSandbox, mode: str) -> None:
    source = scene().convert(mode)
    want = np.asarray(source.convert("RGB"))
    assert_close(as_opencv(sandbox.normalise(encoded(source, "PNG"))), want, 0)


def test_white_under_transparency(sandbox: ImageSandbox) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (200, 0, 0, 255)
    rgba[:4, :4] = (10, 20, 30, 0)
    rgba[4:, :4] = (0, 0, 0, 128)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        got = as_opencv(sandbox.normalise(encoded(Image.fromarray(rgba), kind, **options)))
        assert got[0, 0].tolist() == [255] * 3 and got[0, 7].tolist() == [200, 0, 0]
        assert abs(int(got[7, 0, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for kind in ("PNG", "GIF"):
        assert as_opencv(sandbox.normalise(encoded(palette, kind, transparency=1)))[0, 0].tolist() == [255] * 3
    grey16 = np.full((4, 4), 1000, np.uint16)
    body = encoded(Image.fromarray(grey16), "PNG")
    body = insert_chunk(body, b"tRNS", struct.pack(">H", 1000))
    assert as_opencv(sandbox.normalise(body))[0, 0].tolist() == [255] * 3


def insert_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """A chunk after IHDR."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png[:33] + chunk + png[33:]


def test_cmyk_as_photoshop_and_as_others_write_it(sandbox: ImageSandbox) -> None:
    source = scene().convert("CMYK")
    body = encoded(source, "JPEG", quality=95, subsampling=0)  # Pillow writes the Adobe marker and inverts
    assert_close(as_opencv(sandbox.normalise(body)), np.asarray(scene()), 4)
    at = body.index(b"\xff\xee")
    length = int.from_bytes(body[at + 2 : at + 4], "big")
    plain = body[:at] + body[at + 2 + length :]  # without the marker the values are ink, so the scene is its negative
    assert_close(as_opencv(sandbox.normalise(plain)), np.asarray(source.point(lambda v: 255 - v).convert("RGB")), 4)
    tiff = sandbox.normalise(encoded(source, "TIFF"))
    assert_close(as_opencv(tiff), np.asarray(source.convert("RGB")), 0)
    assert tiff.mode == "CMYK"


def test_icc_profiles(sandbox: ImageSandbox) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    flat = Image.new("RGB", (16, 16), (90, 160, 200))
    unchanged = sandbox.normalise(encoded(flat, "PNG", icc_profile=srgb))
    assert as_opencv(unchanged)[0, 0].tolist() == [90, 160, 200] and unchanged.notes == ()
    swapped = swap_red_and_blue(srgb)
    for kind in ("PNG", "JPEG", "TIFF"):
        result = sandbox.normalise(encoded(flat, kind, icc_profile=swapped))
        assert result.notes == ("icc",)
        assert_close(as_opencv(result), np.full((16, 16, 3), (200, 160, 90)), 5)
    for junk in (b"junk", swapped[:200], b"\0" * 500, swapped.replace(b"RGB ", b"CMYK")):
        result = sandbox.normalise(encoded(flat, "JPEG", icc_profile=junk))
        assert_close(as_opencv(result), np.asarray(flat), 3)


def swap_red_and_blue(profile: bytes) -> bytes:
    """An sRGB profile whose red and blue primaries are exchanged, and which does not call itself sRGB."""
    count = int.from_bytes(profile[128:132], "big")
    swapped = bytearray(profile.replace(b"sRGB", b"xxxx").replace(b"s\0R\0G\0B", b"x\0x\0x\0x"))
    for i in range(count):
        at = 132 + 12 * i
        name = bytes(swapped[at : at + 4])
        swapped[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name, name)
    return bytes(swapped)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_first_frame_of_animations(sandbox: ImageSandbox, kind: str) -> None:
    frames = [scene(), scene().transpose(Image.Transpose.ROTATE_180), Image.new("RGB", (48, 32), "green")]
    result = sandbox.normalise(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert_close(as_opencv(result), np.asarray(scene()), 4)
    assert result.frames == (2 if kind in ("GIF", "TIFF") else 3)


STRANGERS = [
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"<!DOCTYPE html><html>",
    b"%PDF-1.7\n",
    b"\0" * 99,
    b"\0\0\1\0ICO",
    b"GIF",
    b"\x89PNG",
    b"P6 1 1 255 abc",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
]


@pytest.mark.parametrize("body", STRANGERS)
def test_not_an_image(sandbox: ImageSandbox, body: bytes) -> None:
    result = sandbox.normalise(body)
    assert result.error is not None and result.error.startswith("not_an_image") and result.data is None
    assert str(sandbox.decode(body)).startswith("not_an_image")


def test_empty_too_large_and_shapes(sandbox: ImageSandbox) -> None:
    assert sandbox.normalise(b"").error == "empty"
    with ImageSandbox(Limits(max_bytes=10)) as strict:
        assert strict.normalise(b"x" * 11).error == "too_large: 11 bytes"
    assert sandbox.normalise(encoded(Image.new("L", (4000, 4)), "PNG")).error == "aspect: 4000 x 4"
    assert sandbox.normalise(encoded(Image.new("L", (400, 20)), "PNG")).error is None
    assert sandbox.normalise(encoded(Image.new("L", (2001, 2000)), "PNG")).error == "too_many_pixels: 2001 x 2000"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_truncated_files_are_corrupt(sandbox: ImageSandbox, kind: str, keep: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    body = encoded(noise, kind)
    result = sandbox.normalise(body[: int(len(body) * keep)])
    assert result.error is not None and result.error.startswith("corrupt"), result


def test_damage_inside_a_file(sandbox: ImageSandbox) -> None:
    """Pillow passes most of these in silence."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    jpeg, png = bytearray(encoded(noise, "JPEG")), bytearray(encoded(noise, "PNG"))
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 200] = bytes(200)
    png[len(png) // 2] ^= 1
    for body in (jpeg, png):
        result = sandbox.normalise(bytes(body))
        assert result.error is not None and result.error.startswith("corrupt")


def test_every_flipped_bit_of_a_png_is_found(sandbox: ImageSandbox) -> None:
    body, rng = encoded(scene(200, 100), "PNG"), random.Random(11)
    for _ in range(200):
        flipped = bytearray(body)
        flipped[rng.randrange(33, len(body))] ^= 1 << rng.randrange(8)
        error = sandbox.normalise(bytes(flipped)).error
        assert error is not None and error.startswith("corrupt")


def test_unnamed_subsampling_is_still_a_jpeg(sandbox: ImageSandbox) -> None:
    """All components at 1 x 2, which TurboJPEG has no name for; all coefficients zero: `00` and `1010` per block."""
    body = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG", subsampling=0))
    frame, scan = body.index(b"\xff\xc0"), body.index(b"\xff\xda")
    for component in range(3):
        body[frame + 11 + 3 * component] = 0x12
        body[scan + 6 + 2 * component] = 0x00  # the same Huffman tables for all
    blocks = int("001010" * 192, 2).to_bytes(144, "big")
    result = sandbox.normalise(bytes(body[: scan + 14]) + blocks + b"\xff\xd9")
    assert_close(as_opencv(result), np.full((64, 64, 3), 128), 0)


def bombs() -> dict[str, bytes]:
    def ihdr(width: int, height: int) -> bytes:
        data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + data
            + struct.pack(">I", zlib.crc32(b"IHDR" + data))
        )

    small = encoded(scene(), "JPEG")
    at = small.index(b"\xff\xc0")
    wide_jpeg = small[: at + 5] + struct.pack(">HH", 65000, 65000) + small[at + 9 :]
    two_headers = small[:at] + small[at : at + 19] + wide_jpeg[at:]
    webp = encoded(scene(), "WEBP", lossless=True)
    wide_webp = webp[:21] + struct.pack("<I", 16382 | 16382 << 14) + webp[25:]
    animated = encoded(scene(), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 32))])
    wide_canvas = animated[:24] + (16383).to_bytes(3, "little") * 2 + animated[30:]
    gif = encoded(scene(), "GIF")
    wide_gif = gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]
    bmp = encoded(scene(), "BMP")
    wide_bmp = bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:]
    tiff = encoded(scene(), "TIFF").replace(struct.pack("<HHII", 256, 4, 1, 48), struct.pack("<HHII", 256, 4, 1, 2**31))
    text = b"comment\0\0" + zlib.compress(bytes(64_000_000), 9)
    flood = b"".join(insert_chunk(b"\0" * 33, b"zTXt", text)[33:] for _ in range(20))
    plain = encoded(scene(), "PNG")
    many = [Image.new("P", (48, 32), i % 5) for i in range(3000)]
    frames = encoded(scene(), "GIF", save_all=True, append_images=many)
    return {
        "png size": ihdr(2**31 - 1, 2**31 - 1) + plain[33:],
        "png rows": ihdr(1999, 1999) + plain[33:],
        "zTXt": insert_chunk(plain, b"zTXt", text),
        "zTXt flood": plain[:33] + flood + plain[33:],
        "iCCP": insert_chunk(plain, b"iCCP", text),
        "jpeg size": wide_jpeg,
        "jpeg two headers": two_headers,
        "webp size": wide_webp,
        "webp canvas": wide_canvas,
        "gif size": wide_gif,
        "bmp size": wide_bmp,
        "tiff size": tiff,
        "gif frames": frames,
    }


BOMBS = (
    *(
        "png size",
        "png rows",
        "zTXt",
        "zTXt flood",
        "iCCP",
        "jpeg size",
        "jpeg two headers",
        "webp size",
        "webp canvas",
    ),
    *("gif size", "bmp size", "tiff size", "gif frames"),
)


@pytest.fixture(scope="module")
def made_bombs() -> dict[str, bytes]:
    made = bombs()
    assert tuple(made) == BOMBS
    return made


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(sandbox: ImageSandbox, made_bombs: dict[str, bytes], name: str) -> None:
    start = time.monotonic()
    result = sandbox.normalise(made_bombs[name])
    assert time.monotonic() - start < 2
    codes = {"gif frames": None, "png rows": "corrupt", "zTXt": "corrupt", "zTXt flood": "corrupt", "iCCP": "corrupt"}
    code = result.error and result.error.partition(":")[0]
    assert code == codes.get(name, "too_many_pixels"), result.error
    assert sandbox.normalise(encoded(scene(), "PNG")).error is None


def test_mutated_pictures_never_hurt_the_parent(sandbox: ImageSandbox) -> None:
    rng = random.Random(20260101)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    sources = [encoded(image, kind) for kind in LOSSES for image in (noise, scene())]
    sources += [encoded(scene().convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    codes = set()
    for body in sources * 40:
        mutant = bytearray(body)
        for _ in range(rng.choice((1, 1, 4, 16))):
            at = rng.randrange(min(len(mutant), rng.choice((64, 10**6))))
            how = rng.randrange(4)
            if how == 0:
                mutant[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                mutant[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            elif how == 2:
                del mutant[at : at + rng.randrange(1, 9)]
            else:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 9))
            mutant = mutant or bytearray(b"x")
        start = time.monotonic()
        result = sandbox.normalise(bytes(mutant))
        assert time.monotonic() - start < 10
        if result.error is None:
            as_opencv(result)
        codes.add(result.error and result.error.partition(":")[0])
    known = {None, "corrupt", "not_an_image", "too_many_pixels", "aspect", "memory", "timeout", "crashed"}
    assert {None, "corrupt"} <= codes <= known


def child(sandbox: ImageSandbox) -> Any:
    sandbox.normalise(encoded(scene(), "PNG"))
    [process] = [entry._process for entry in sandbox._idle.queue if entry is not None]
    return process


def test_a_killed_child_costs_one_picture() -> None:
    good = encoded(scene(), "PNG")
    with ImageSandbox(Limits()) as sandbox:
        process = child(sandbox)
        process.kill()
        process.wait()
        assert sandbox.normalise(good).error == "crashed: SIGKILL"
        assert sandbox.normalise(good).error is None


def test_a_stopped_child_is_a_timeout() -> None:
    import signal

    good = encoded(scene(), "PNG")
    with ImageSandbox(Limits(seconds=0.5)) as sandbox:
        process = child(sandbox)
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert sandbox.normalise(good).error == "timeout: 0.5 s"
        assert time.monotonic() - start < 1.5
        assert sandbox.normalise(good).error is None
        assert process.poll() is not None


def test_memory_is_bounded() -> None:
    big = encoded(Image.new("L", (9000, 9000)), "PNG", compress_level=1)  # 324 MB as RGB in Pillow
    with ImageSandbox(Limits(memory_mb=400)) as sandbox:
        assert str(sandbox.normalise(big).error).startswith("memory")
        assert sandbox.normalise(encoded(scene(), "PNG")).error is None


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import io, os\nfrom PIL import Image\nfrom pipeline.images import *\n"
        "s = ImageSandbox(Limits())\ns.normalise(b'x')\n"
        "print(s._idle.queue[0]._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_many_threads_share_the_children() -> None:
    bodies = [encoded(Image.new("RGB", (16, 16), (i, i, i)), "PNG") for i in range(60)]
    got: dict[int, Any] = {}
    with ImageSandbox(Limits(), children=2) as sandbox:

        def work(number: int) -> None:
            got[number] = sandbox.decode(bodies[number])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(got[i][0, 0].tolist() == [i, i, i] for i in range(60))


PROBES = {
    "open": "open('/etc/hostname')",
    "write": "open('/tmp/headrace-probe', 'w')",
    "socket": "__import__('socket').socket()",
    "fork": "os.fork()",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "thread": "__import__('threading').Thread(target=print).start()",
    "kill": "os.kill(os.getppid(), 0)",
    "unlink": "os.unlink('/tmp/headrace-probe')",
    "list": "os.listdir('/')",
    "limits": "__import__('resource').setrlimit(0, (5, 5))",
    "memory": "bytearray(600 << 20)",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
@pytest.mark.parametrize("probe", PROBES)
def test_confined_code_can_do_nothing_else(probe: str) -> None:
    code = f"""if True:
        import os, sys, socket, threading, resource
        from pipeline.sandbox.jail import confine
        assert confine(512)
        try:
            {PROBES[probe]}
        except (OSError, MemoryError, RuntimeError, ValueError):
            print("denied", flush=True)
        else:
            print("done", flush=True)
        os._exit(0)
    """
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=20, check=False)
    assert done.stdout.split() == ["denied"], done.stderr
