"""Hostile picture bytes in, plain pixels or a reason out, by child processes that have little to lose.

A child is bounded in memory, files and system calls by itself, and in time by its parent here: one that hangs, dies or
runs out of memory is replaced, and only the picture it held is lost. What is decoded, and how, is `pipeline.sandbox`'s.
"""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from pipeline.base import Config, HeadraceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PACKAGES: Final = Path(__file__).parents[1]
_START_SECONDS: Final = 60.0
_BUFFER: Final = 1 << 20  # bytes of socket buffer: most pictures fit


class Limits(Config):
    """What a picture may cost. `max_pixels` and `max_aspect` are judged by its header, before pixels are allocated;
    `memory_mb` is a child's whole address space; `seconds` is wall-clock time per picture."""

    max_pixels: int = Field(default=100_000_000, gt=0)
    max_bytes: int = Field(default=50_000_000, gt=0)
    max_aspect: float = Field(default=20.0, ge=1)
    seconds: float = Field(default=10.0, gt=0)
    memory_mb: int = Field(default=1024, ge=256)


@dataclass(frozen=True, slots=True)
class Normalised:
    """A picture made plain, or the reason why not. Exactly one of `data` and `error` is None.

    `data` is a 24-bit BMP (OpenCV reads one at memory speed): upright, sRGB, first frame, over white. `error` is
    "code" or "code: detail" with code one of empty, not_an_image, corrupt, too_many_pixels, too_large, aspect,
    timeout, memory, crashed. `width` and `height` are those of `data`; `frames` of 2 also stands for more in GIF and
    TIFF; `mode` is the source's; `notes` say what was undone (orientation, icc, transparency).
    """

    data: bytes | None
    error: str | None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    frames: int | None = None
    mode: str | None = None
    notes: tuple[str, ...] = ()


class ImageSandbox:
    """`children` decoders that any number of threads may share. Children start when first needed."""

    def __init__(self, limits: Limits, children: int = 1) -> None:
        self._limits = limits
        self._count = children
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(children):
            self._idle.put(None)

    def __enter__(self) -> ImageSandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the children, once each is idle."""
        for child in [self._idle.get() for _ in range(self._count)]:
            if child is not None:
                child.end()
            self._idle.put(None)

    def normalise(self, body: bytes) -> Normalised:
        """`body` as a plain BMP."""
        header, data = self._ask(b"N", body)
        if "error" in header:
            return Normalised(None, header["error"])
        facts = {name: header[name] for name in ("width", "height", "format", "frames", "mode")}
        return Normalised(bytes(data), None, **facts, notes=tuple(header["notes"]))

    def decode(self, body: bytes) -> NDArray[np.uint8] | str:
        """`body` as RGB pixels (H, W, 3), uint8, upright, or an error as in `Normalised`."""
        import numpy as np

        header, data = self._ask(b"D", body)
        if "error" in header:
            return str(header["error"])
        return np.frombuffer(data, np.uint8).reshape(header["height"], header["width"], 3)

    def _ask(self, op: bytes, body: bytes) -> tuple[dict[str, Any], bytearray]:
        if not body:
            return {"error": "empty"}, bytearray()
        if len(body) > self._limits.max_bytes:
            return {"error": f"too_large: {len(body)} bytes"}, bytearray()
        child, sound = self._idle.get(), None
        try:
            child = child or _Child(self._limits)
            header, data = child.ask(op, body)
            if not header.get("error", "").startswith(_FATAL):
                sound = child
            return header, data
        finally:  # one that was interrupted half-way through a frame is not sound either
            if sound is None and child is not None:
                child.end()
            self._idle.put(sound)


_FATAL: Final = ("timeout", "memory", "crashed")


class _Child:
    """One decoder process, used by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.seconds
        self._link, theirs = socket.socketpair()
        with theirs:
            for end in (self._link, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.sandbox.child", limits.model_dump_json()],
                cwd=_PACKAGES,
                start_new_session=True,  # Ctrl-C is for the parent to act upon
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._link.settimeout(_START_SECONDS)
        try:
            ready = self._link.makefile("rb", buffering=0).readline()
        except OSError:
            ready = b""
        if not ready:
            code = self._kill()
            raise HeadraceError(
                f"the picture decoder did not start (exit code {code})",
                hint="raise the memory limit of pictures, or check that Pillow and simplejpeg are installed",
            )

    def ask(self, op: bytes, body: bytes) -> tuple[dict[str, Any], bytearray]:
        """The child's answer, or an error of ours if it takes too long or dies; after one of ours it must be ended."""
        deadline = time.monotonic() + self._seconds
        try:
            self._link.settimeout(self._seconds)
            self._link.sendall(op + len(body).to_bytes(4, "little"))
            self._link.sendall(body)
            head = self._receive(8, deadline)
            text = self._receive(int.from_bytes(head[:4], "little"), deadline)
            data = self._receive(int.from_bytes(head[4:], "little"), deadline)
            return json.loads(text), data
        except TimeoutError:
            return {"error": f"timeout: {self._seconds:g} s"}, bytearray()
        except OSError:
            return {"error": self._post_mortem()}, bytearray()

    def _receive(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._link.settimeout(left)
            count = self._link.recv_into(view[got:])
            if not count:
                raise ConnectionResetError
            got += count
        return data

    def _post_mortem(self) -> str:
        code = self._kill()
        if code == -signal.SIGPROF:
            return f"timeout: {self._seconds:g} s of CPU"
        return f"crashed: {signal.Signals(-code).name}" if code < 0 else f"crashed: exit code {code}"

    def _kill(self) -> int:
        """The exit code of a child that has ended or is about to; one that does not end is killed."""
        self._link.close()
        try:
            return self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def end(self) -> None:
        self._process.kill()
        self._kill()
