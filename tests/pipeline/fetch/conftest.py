"""A small web server on loopback that says exactly what a test wants, byte by byte, and logs what it was asked."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.fetch import FetchConfig
from pipeline.fetch.client import Client

Handler = Callable[[socket.socket, "Request"], None]
Answer = bytes | Handler
Make = Callable[..., Client]
HEAD = b"HTTP/1.1 200 OK\r\n"


@dataclass
class Request:
    """One request as logged: when its head had arrived, and how many others of its host were being answered then."""

    at: float
    host: str
    path: str
    headers: dict[str, str]
    others: int


def ok(body: bytes = b"picture", *headers: str, status: str = "200 OK") -> bytes:
    head = "".join(f"{line}\r\n" for line in headers)
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return ok(b"moved", f"Location: {location}", status=status)


def drip(pieces: bytes, pause: float = 0.05) -> Handler:
    def handler(link: socket.socket, _: Request) -> None:
        while True:
            for at in range(len(pieces)):
                link.sendall(pieces[at : at + 1])
                time.sleep(pause)

    return handler


def endless(start: bytes, more: bytes) -> Handler:
    def handler(link: socket.socket, _: Request) -> None:
        link.sendall(start)
        while True:
            link.sendall(more)

    return handler


def reset(start: bytes) -> Handler:
    def handler(link: socket.socket, _: Request) -> None:
        link.sendall(start)
        time.sleep(0.05)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return handler


def after(start: bytes, handler: Handler) -> Handler:
    def both(link: socket.socket, request: Request) -> None:
        link.sendall(start)
        handler(link, request)

    return both


class Web:
    """Serves `pages[host + path]` (or `pages[path]`, for any host); 404 for the rest, robots.txt included."""

    def __init__(self) -> None:
        self.pages: dict[str, Answer] = {}
        self.log: list[Request] = []
        self.connections = 0
        self._busy: Counter[str] = Counter()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connect(self) -> dict[str, str]:
        return {"*.web.test": f"127.0.0.1:{self.port}"}

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.log if path in (request.path, request.host + request.path)]

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            while head := _read_head(link):
                lines = head.decode("latin-1").split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                host = headers.get("host", "").partition(":")[0]
                request = Request(time.monotonic(), host, lines[0].split(" ")[1], headers, self._busy[host])
                self.log.append(request)
                self._busy[host] += 1
                try:
                    path = request.path.partition("?")[0]
                    answer = self.pages.get(host + path, self.pages.get(path, ok(b"none", status="404 Not Found")))
                    if isinstance(answer, bytes):
                        link.sendall(answer)
                    else:
                        answer(link, request)
                        return
                finally:
                    self._busy[host] -= 1


def _read_head(link: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        chunk = link.recv(1)
        if not chunk:
            return b""
        head += chunk
    return head[:-4]


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


@pytest.fixture
def client(web: Web, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Makes clients of the server; settings may be overridden."""
    clients = []

    def make(**settings: Any) -> Client:
        quick: dict[str, Any] = {
            "connect_timeout": 1,
            "read_timeout": 1,
            "total_timeout": 2,
            "retries": 0,
            "per_host_rate": 10_000,
        }
        quick |= {"connect": web.connect, "robots": False, "opt_out": False}
        clients.append(Client(FetchConfig.model_validate(quick | settings), tmp_path / "limits"))
        return clients[-1]

    yield make
    for made in clients:
        made.close()
