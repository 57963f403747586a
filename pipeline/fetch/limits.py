"""Per-host pacing that holds across every process of this machine: a rate, a number of connections, and `Retry-After`.

Each host has one 24-byte file (when the next request may start, until when the host asked for silence, and by which
status) and one empty file per connection, all guarded by flock, which the kernel releases when a process dies. Times
are wall-clock, so that the files survive a reboot; values absurdly far ahead (the clock was set back) are ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_HOLD = 86_400.0  # seconds a host's wish for silence is remembered at most
_STATE = struct.Struct("<ddq")
_POLL = (0.001, 0.05)  # seconds between looks for a free connection: first, longest


class HostBusy(Exception):
    """The turn would take longer than the caller may wait; `status` is the 429 or 503 that asked for it, or 0."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"{seconds:.0f} s until the next turn")
        self.status = status


class HostLimits:
    """Turns at hosts: at most `rate` requests per second and `connections` at once, per host, over all processes."""

    def __init__(self, folder: Path, connections: int, rate: float) -> None:
        self._folder = folder
        self._connections = connections
        self._gap = 1.0 / rate

    @contextmanager
    def turn(self, host: str, max_wait: float) -> Iterator[float]:
        """Hold a connection to `host` while the block runs; yields the seconds waited. Raises HostBusy instead of
        waiting longer than `max_wait`."""
        start = time.monotonic()
        path = self._path(host)
        slot = self._take_slot(path, start + max_wait)
        try:
            self._await_turn(path, start + max_wait)
            yield time.monotonic() - start
        finally:
            os.close(slot)  # closing releases the lock

    def hold(self, host: str, seconds: float, status: int) -> None:
        """No process may start a request to `host` for `seconds`, because it answered `status`."""
        with _locked(self._path(host)) as file:
            next_at, hold_until, old = _read(file)
            until = time.time() + min(max(seconds, 0.0), MAX_HOLD)
            _write(file, next_at, max(hold_until, until), status if until > hold_until else old)

    def _path(self, host: str) -> Path:
        name = hashlib.sha256(host.encode()).hexdigest()[:32]
        return self._folder / name[:2] / name

    def _take_slot(self, path: Path, deadline: float) -> int:
        """A locked file descriptor of one of the host's connections."""
        pause = _POLL[0]
        while True:
            for number in range(self._connections):
                slot = _open(path.with_name(f"{path.name}.{number}"))
                try:
                    fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return slot
                except BlockingIOError:
                    os.close(slot)
            left = deadline - time.monotonic()
            if left <= 0:
                raise HostBusy(0, 0.0)
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _POLL[1])

    def _await_turn(self, path: Path, deadline: float) -> None:
        """Reserve the next start, sleep until then, and look again: meanwhile the host may have asked for silence."""
        while True:
            with _locked(path) as file:
                next_at, hold_until, status = _read(file)
                now = time.time()
                at = max(now, next_at, hold_until)
                wait = at - now
                if wait > deadline - time.monotonic() and wait > 0:
                    raise HostBusy(status if hold_until > now else 0, wait)
                _write(file, at + self._gap, hold_until, status)
            if wait <= 0:
                return
            time.sleep(wait)
            with _locked(path) as file:
                if _read(file)[1] <= time.time():
                    return


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _read(file: int) -> tuple[float, float, int]:
    raw = os.pread(file, _STATE.size, 0)
    if len(raw) != _STATE.size:
        return 0.0, 0.0, 0
    next_at, hold_until, status = _STATE.unpack(raw)
    horizon = time.time() + MAX_HOLD + 60
    return (next_at if next_at < horizon else 0.0), (hold_until if hold_until < horizon else 0.0), status


def _write(file: int, next_at: float, hold_until: float, status: int) -> None:
    os.pwrite(file, _STATE.pack(next_at, hold_until, status), 0)
