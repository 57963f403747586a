"""The mini-web's server: HTTP/1.1 on loopback, many hosts behind one port, in a process of its own.

The process reads its routes from standard input as JSON, writes its ports to standard output, draws each picture when
it is asked for, and ends when its standard input does or its parent is gone. What it answers depends on the routes
and, where a reply refuses at first, on how often the URL has been asked for in this process's life.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import gzip
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

from pipeline.base import HeadraceError
from pipeline.miniweb import hosts
from pipeline.miniweb.replies import Reply, address, content, restored

CONTROL = "control.invalid"  # the host whose /log is the access log
BEAT = 0.2  # seconds between the bytes of a drip
_MAX_HEAD = 1 << 16
_ENDLESS = bytes(range(256)) * 256


class Access(NamedTuple):
    """One request as it was answered; `time` in seconds since the epoch, `status` 0 for a reset connection."""

    time: float
    host: str
    target: str
    status: int
    agent: str


class Server(NamedTuple):
    """A running mini-web. `connect` maps its hosts to where they are found, for a client's settings."""

    port: int
    closed_port: int

    @property
    def connect(self) -> dict[str, str]:
        return {hosts.PATTERN: f"127.0.0.1:{self.port}", hosts.CLOSED: f"127.0.0.1:{self.closed_port}"}

    def log(self) -> list[Access]:
        """Every request so far, in the order of the answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/log", headers={"Host": CONTROL})
            return [Access(*row) for row in json.loads(connection.getresponse().read())]


@contextlib.contextmanager
def running(routes: Iterable[tuple[str, Reply]]) -> Iterator[Server]:
    """Serve these URLs in another process until the block ends. A URL that comes twice is answered as at first."""
    command = [sys.executable, "-m", "pipeline.miniweb.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        try:
            plan = [(url, dataclasses.asdict(reply)) for url, reply in routes]
            process.stdin.write(json.dumps(plan).encode() + b"\n")
            process.stdin.flush()
            ports = process.stdout.readline().split()
            if not ports:
                raise HeadraceError("the mini-web's server did not start", hint="its own message stands above")
            yield Server(*map(int, ports))
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.terminate()


# ---------------------------------------------------------------------------- inside the server's process


class _Limit:
    """A token bucket: `burst` requests at once, then `rate` a second."""

    def __init__(self, burst: int, rate: float) -> None:
        self.burst, self.rate = burst, rate
        self.tokens, self.last = float(burst), time.monotonic()

    def allows(self) -> bool:
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.last) * self.rate)
        self.last = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class _Request(NamedTuple):
    method: str
    host: str
    target: str
    agent: str
    keep_alive: bool


class _Site:
    """All hosts: their planned replies, how often each was asked for, and the access log."""

    def __init__(self, plan: list[tuple[str, dict[str, Any]]]) -> None:
        self.replies: dict[tuple[str, str], Reply] = {}
        for url, values in plan:
            self.replies.setdefault(address(url), restored(values))
        self.asked: Counter[tuple[str, str]] = Counter()
        self.limits = {host: _Limit(burst, rate) for host, (burst, rate) in hosts.RATE.items()}
        self.log: list[Access] = []

    def reply(self, request: _Request) -> tuple[Reply, str, bytes]:
        """The reply to a request with its content type and body."""
        if request.method != "GET":
            return _text(405, "method not allowed")
        if request.host == CONTROL:
            return _text(200, json.dumps(self.log), "application/json")
        if request.target == "/robots.txt":
            return _text(*hosts.robots_txt(request.host))
        if request.target == "/.well-known/tdmrep.json":
            return _text(*hosts.tdmrep_json(request.host), "application/json")
        if request.host in self.limits and not self.limits[request.host].allows():
            return _text(429, "too many requests", headers=(("Retry-After", "1"),))
        found = self.replies.get((request.host, request.target))
        if found is None:
            return _text(404, "not found")
        times = self.asked[request.host, request.target]
        self.asked[request.host, request.target] += 1
        if times < len(found.refusals):
            return _text(found.refusals[times], "not now", headers=_retry_after(found.retry_after))
        return found, *content(found)


def _text(
    status: int, text: str, kind: str = "text/plain", headers: tuple[tuple[str, str], ...] = ()
) -> tuple[Reply, str, bytes]:
    return Reply(status=status, headers=headers), kind, text.encode()


def _retry_after(form: str) -> tuple[tuple[str, str], ...]:
    if not form:
        return ()
    value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    return (("Retry-After", value),)


async def _converse(site: _Site, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All requests of one connection."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        open_ = True
        while open_:
            request = _parse(await reader.readuntil(b"\r\n\r\n"))
            if request.host in hosts.LATENCY:
                await asyncio.sleep(hosts.LATENCY[request.host])
            reply, kind, body = site.reply(request)
            if request.host != CONTROL:
                status = 0 if reply.delivery == "reset" else reply.status
                site.log.append(Access(time.time(), request.host, request.target, status, request.agent))
            open_ = await _send(writer, reply, kind, body) and request.keep_alive
    writer.close()


def _parse(head: bytes) -> _Request:
    lines = head.decode("latin-1").split("\r\n")
    method, target, version = [*lines[0].split(" "), "", ""][:3]
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    host = headers.get("host", "").rsplit(":", 1)[0].lower()
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return _Request(method, host, unquote(target), headers.get("user-agent", ""), keep_alive)


async def _send(writer: asyncio.StreamWriter, reply: Reply, kind: str, body: bytes) -> bool:
    """Send a reply as its delivery says; whether the connection can be used again."""
    if reply.delivery == "reset":
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return False
    pieces, framing, whole = _delivered(reply.delivery, body)
    own = {name.lower() for name, _ in reply.headers}
    headers = [*reply.headers, *framing, *([] if "content-type" in own else [("Content-Type", kind)])]
    phrase = http.client.responses.get(reply.status, "")
    lines = [f"HTTP/1.1 {reply.status} {phrase}", *(f"{name}: {value}" for name, value in headers)]
    head = "\r\n".join(lines).encode("utf-8") + b"\r\n"
    writer.write(head if reply.delivery == "slow_headers" else head + b"\r\n")
    async for piece in pieces:
        writer.write(piece)
        await writer.drain()
    return whole


Headers = list[tuple[str, str]]
_CHUNKED = [("Transfer-Encoding", "chunked")]


def _delivered(delivery: str, body: bytes) -> tuple[AsyncIterator[bytes], Headers, bool]:
    """What follows the headers, the headers that frame it, and whether the reply ends."""
    half = body[: max(1, len(body) // 2)]
    if delivery == "chunked":
        return _all(*_chunks(body), b"0\r\n\r\n"), _CHUNKED, True
    if delivery == "cut_chunked":
        return _all(*_chunks(half)), _CHUNKED, False
    if delivery == "endless":
        return _for_ever(_chunks(_ENDLESS)[0], 0.0), _CHUNKED, False
    if delivery == "slow_headers":
        return _for_ever(b"X-Wait: a little longer\r\n", BEAT), [], False
    if delivery == "drip":
        return _for_ever(body[:1], BEAT), _length(len(body) + 100_000), False
    if delivery == "huge_length":
        return _for_ever(_ENDLESS, 0.0), _length(10**11), False
    if delivery == "cut":
        return _all(half), _length(len(body)), False
    encoding: Headers = []
    if delivery in ("gzip", "gzip_bomb"):
        body = gzip.compress(body, mtime=0) if delivery == "gzip" else _gzip_bomb()
        encoding = [("Content-Encoding", "gzip")]
    return _all(body), [*_length(len(body)), *encoding], True


@lru_cache(maxsize=1)
def _gzip_bomb() -> bytes:
    """1 MB of gzip that unpacks to 1 GB of zeros: one deflate block, fully flushed and so repeatable, 64 times."""
    zeros, times = bytes(1 << 24), 64
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    check = 0
    for _ in range(times):
        check = zlib.crc32(zeros, check)
    header = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"  # RFC 1952, 2.3
    return header + block * times + packer.flush() + struct.pack("<II", check, len(zeros) * times)


def _length(size: int) -> Headers:
    return [("Content-Length", str(size))]


def _chunks(body: bytes) -> list[bytes]:
    size = 1 << 16
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]


async def _all(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _for_ever(piece: bytes, pause: float) -> AsyncIterator[bytes]:
    while True:
        yield piece
        await asyncio.sleep(pause)


async def _until_orphaned(ended: asyncio.Event, parent: int) -> None:
    """Until standard input has ended, or the parent has (its other children may hold the pipe open)."""
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), 1.0)


async def _serve(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    site = _Site(json.loads(sys.stdin.buffer.readline()))
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound, never listening: connections to it are refused
    server = await asyncio.start_server(
        lambda reader, writer: _converse(site, reader, writer), "127.0.0.1", 0, limit=_MAX_HEAD, backlog=512
    )
    print(server.sockets[0].getsockname()[1], closed.getsockname()[1], flush=True)
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def watch() -> None:
        sys.stdin.buffer.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch, daemon=True).start()
    await _until_orphaned(ended, parent)
    os._exit(0)  # open drips would keep the loop waiting


if __name__ == "__main__":
    asyncio.run(_serve(os.getppid()))
