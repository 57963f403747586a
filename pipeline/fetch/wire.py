"""Sockets that obey a deadline and a byte budget, and urllib3 pools whose connections only go where the guard allows.

The deadline and budget belong to the calling thread (`BUDGET`), since a kept-alive connection outlives a request.
Every byte is counted where it leaves the socket, so endless headers, chunk extensions and trailers are bounded too.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Mapping
from email.errors import FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect
from typing import Any

import certifi
import urllib3
from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssl_ import create_urllib3_context

from pipeline.fetch.guard import Address, FetchError, permitted_addresses

MAX_OVERHEAD = 1 << 20  # bytes of headers, chunk framing and trailers allowed beside the body
MAX_ADDRESSES = 3  # tried per connection


class _Budget(threading.local):
    """What the calling thread's current request may still spend: time until `deadline` (monotonic), `bytes_left`."""

    deadline = 0.0
    bytes_left = 0
    read_timeout = 0.0

    def start(self, seconds: float, read_timeout: float, size: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.read_timeout = read_timeout
        self.bytes_left = size + MAX_OVERHEAD

    def patience(self, limit: float) -> float:
        """Seconds the next blocking call may take, at most `limit`; FetchError `timeout` when there are none left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise FetchError("timeout")  # in the same words as a read: which clock runs out first is chance
        return min(left, limit)

    def spend(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise FetchError("too_large", "more than the cap on the wire")


BUDGET = _Budget()


class _PlainSocket(socket.socket):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(BUDGET.patience(BUDGET.read_timeout))
        size = super().recv_into(buffer, nbytes, flags)
        BUDGET.spend(size)
        return size


class _TLSSocket(ssl.SSLSocket):
    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(BUDGET.patience(BUDGET.read_timeout))
        size = super().recv_into(buffer, nbytes, flags)
        BUDGET.spend(size)
        return size


class _Guarded(HTTPConnection):
    connect_to: Mapping[str, Address]
    connect_timeout: float

    def _new_conn(self) -> socket.socket:
        """A connected socket to a checked address; what was checked is what is connected to."""
        addresses = permitted_addresses(
            self._dns_host, self.port, self.connect_to, BUDGET.patience(self.connect_timeout)
        )
        failure = FetchError("connect", "no address")
        for address in addresses[:MAX_ADDRESSES]:
            sock = _PlainSocket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.settimeout(BUDGET.patience(self.connect_timeout))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                sock.settimeout(BUDGET.patience(BUDGET.read_timeout))  # for a TLS handshake
                return sock
            except TimeoutError:
                failure = FetchError("timeout", "connecting")
            except OSError as error:
                failure = FetchError("connect", (error.strerror or type(error).__name__).lower())
            except FetchError:
                sock.close()
                raise
            sock.close()
        raise failure

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        """As urllib3's, but a header line that ends the headers early (all after it would be lost) is an error."""
        response = super().getresponse()
        if _has_torn_headers(response):
            response.close()
            raise FetchError("protocol", "malformed header line")
        return response


def _has_torn_headers(response: HTTPResponse) -> bool:
    original = response._original_response
    torn = (MissingHeaderBodySeparatorDefect, FirstHeaderLineIsContinuationDefect)
    return original is not None and any(isinstance(defect, torn) for defect in original.msg.defects)


class _GuardedTLS(_Guarded, HTTPSConnection):
    pass


def open_pools(
    connect: Mapping[str, Address], connect_timeout: float, per_host: int, hosts: int
) -> urllib3.PoolManager:
    """Kept-alive connections to at most `hosts` hosts, `per_host` each. No proxies, whatever the environment says.

    Certificates are verified against the system's and certifi's authorities, under the URL's own host name.
    """
    return _Pools(connect, connect_timeout, num_pools=hosts, maxsize=per_host)


def _tls_context() -> ssl.SSLContext:
    context = create_urllib3_context()
    context.load_default_certs()
    context.load_verify_locations(certifi.where())
    context.sslsocket_class = _TLSSocket
    return context


class _Pools(urllib3.PoolManager):
    """Makes pools of guarded connections only, so that no way through it leads past the guard."""

    def __init__(self, connect: Mapping[str, Address], connect_timeout: float, **keywords: Any) -> None:
        super().__init__(**keywords)
        settings = {"connect_to": connect, "connect_timeout": connect_timeout}
        self._tls: ssl.SSLContext | None = None  # takes 20 ms to load
        self._kinds = {
            "http": type("_Guarded", (_Guarded,), settings),
            "https": type("_GuardedTLS", (_GuardedTLS,), settings),
        }

    def _new_pool(
        self, scheme: str, host: str, port: int, request_context: dict[str, Any] | None = None
    ) -> urllib3.HTTPConnectionPool:
        if scheme == "https":  # one thread at a time is here
            self._tls = self._tls or _tls_context()
            request_context = (request_context or {}) | {"ssl_context": self._tls}
        pool = super()._new_pool(scheme, host, port, request_context)
        pool.ConnectionCls = self._kinds[scheme]
        return pool
