"""One URL in, one picture's bytes or one reason out, whatever the server does.

A fetch asks the host's wishes (robots.txt, TDMRep), waits for its turn there, connects only where the guard allows, and
does all of that again after each redirect. It retries what can succeed, and never raises for anything a server does; an
OSError that leaves `fetch` comes from the limits' folder on this machine's disk.
"""

from __future__ import annotations

import builtins
import hashlib
import logging
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import InvalidHeader

from pipeline.fetch import FetchConfig, optout
from pipeline.fetch.failures import server_errors
from pipeline.fetch.guard import FetchError, join_url, normalise_url, parse_exemption
from pipeline.fetch.limits import HostBusy, HostLimits
from pipeline.fetch.robots import MAX_FILE, HostWishes
from pipeline.fetch.wire import BUDGET, open_pools

__all__ = ["Client", "FetchConfig", "Fetched", "normalise_url", "retryable"]

BACKOFF = 0.5  # seconds before the first retry, doubling, times 0.5 to 1.5
_POOLED_HOSTS = 64
_CHUNK = 1 << 16
_LONGEST = 10**12  # seconds, finite, that a host can ask us to wait; the hold has its own cap
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})
_TRANSIENT = frozenset(
    {
        "timeout",
        "reset",
        "truncated",
        "connect",
        "http_408",
        "http_429",
        "http_500",
        "http_502",
        "http_503",
        "http_504",
    }
)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one URL. Exactly one of `body` and `error` ("code: detail") is None."""

    body: builtins.bytes | None
    error: str | None
    status: int | None  # of the last response
    final_url: str
    content_type: str | None
    opt_out: str | None  # the opt-out headers as sent, honoured or not
    attempts: int
    sha256: str | None  # of body, hex
    bytes: int  # of body, or 0; kept where the body is not
    permanent: bool  # no later retry can help


@dataclass(slots=True)
class _Trip:
    """What one URL has used up and seen, over all its hops and attempts."""

    url: str
    time_left: float
    wait_left: float
    attempts: int = 0
    status: int | None = None
    content_type: str | None = None
    opt_outs: dict[str, None] = field(default_factory=dict)


def retryable(error: str) -> bool:
    """Whether a later attempt at a URL that failed with `error` ("code" or "code: detail") can succeed."""
    code, _, detail = error.partition(": ")
    return code in _TRANSIENT or (code, detail) == ("dns", "temporary failure") or detail.startswith("unreachable")


class Client:
    """Fetches from many threads at once. Clients that share `limits_dir`, in any process, share each host's limits."""

    def __init__(self, config: FetchConfig, limits_dir: Path) -> None:
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every malformed header
        self._config = config
        self._limits = HostLimits(limits_dir / "hosts", config.per_host_connections, config.per_host_rate)
        asked = f"wishes-{int(config.robots)}{int(config.opt_out)}"  # a wish that was not asked for is not known
        self._wishes = HostWishes(limits_dir / asked, self._get_host_file, config.robots, config.opt_out)
        self._connect = {name: parse_exemption(name, address) for name, address in config.connect.items()}
        self._pools = open_pools(self._connect, config.connect_timeout, config.per_host_connections, _POOLED_HOSTS)
        self._headers = {"User-Agent": config.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"}

    def close(self) -> None:
        """Close all kept-alive connections."""
        self._pools.clear()

    def fetch(self, url: str) -> Fetched:
        """The picture at `url`, or why not."""
        target, invalid = normalise_url(url)
        trip = _Trip(target or url, self._config.total_timeout, self._config.max_wait)
        if target is None:
            return _fetched(trip, None, invalid)
        try:
            body = self._with_retries(trip, target, picture=True)
        except FetchError as error:
            return _fetched(trip, None, str(error))
        return _fetched(trip, body, None)

    def _get_host_file(self, url: str) -> bytes:
        trip = _Trip(url, self._config.total_timeout, self._config.max_wait)
        return self._with_retries(trip, url, picture=False)

    def _with_retries(self, trip: _Trip, target: str, picture: bool) -> bytes:
        for retry in range(self._config.retries + 1):
            trip.attempts += 1
            try:
                return self._follow(trip, target, picture)
            except FetchError as error:
                last = error
                pause = backoff(target, retry) if error.retry_after is None else error.retry_after
                out_of_reach = trip.time_left <= 0 or pause > trip.wait_left
                if error.code not in _TRANSIENT or retry == self._config.retries or out_of_reach:
                    break
                if error.retry_after is None:  # else the next turn at that host waits
                    trip.wait_left -= pause
                    time.sleep(pause)
        raise last

    def _follow(self, trip: _Trip, target: str, picture: bool) -> bytes:
        """The body at the end of the redirects from `target`."""
        trip.url, trip.status, trip.content_type = target, None, None
        seen = {target}
        while True:
            if picture:
                self._wishes.check(trip.url)
            with self._response(trip, picture) as response:
                if response.status in (200, 203):
                    return self._read_body(response, picture)
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    raise FetchError(f"http_{response.status}")
            trip.url = _next_hop(trip.url, location)
            hops = self._config.max_redirects if picture else max(5, self._config.max_redirects)
            if trip.url in seen or len(seen) > hops:
                raise FetchError("redirect_loop", f"{len(seen)} redirects")
            seen.add(trip.url)

    @contextmanager
    def _response(self, trip: _Trip, picture: bool) -> Iterator[urllib3.BaseHTTPResponse]:
        """A response whose headers do not opt out, of a host that is not busy.

        The host's turn is held, and the clock runs, meanwhile.
        """
        try:
            with self._limits.turn(_host(trip.url), trip.wait_left) as waited:
                trip.wait_left -= waited
                start = time.monotonic()
                size = self._config.max_bytes if picture else MAX_FILE
                BUDGET.start(trip.time_left, self._config.read_timeout, size)
                response: urllib3.BaseHTTPResponse | None = None
                try:
                    with server_errors():
                        response = self._request(trip.url)
                        self._note(trip, response, picture)
                    if response.status in _BUSY:
                        raise FetchError(f"http_{response.status}", retry_after=self._leave_alone(trip, response))
                    with server_errors():
                        yield response
                finally:
                    trip.time_left -= time.monotonic() - start
                    if response is not None:
                        response.close()
        except HostBusy as error:
            trip.status = error.status or trip.status
            code = f"http_{error.status}" if error.status else "timeout"
            raise FetchError(code, f"the host asks to wait: {error}", retry_after=math.inf) from None

    def _leave_alone(self, trip: _Trip, response: urllib3.BaseHTTPResponse) -> float:
        """Hold a busy host for as long as it asks, else for our own backoff; returns those seconds.

        It is done within its turn, before another process asks it.
        """
        asked = _retry_after(response)
        pause = backoff(trip.url, trip.attempts - 1) if asked is None else asked
        self._limits.hold(_host(trip.url), pause, response.status)
        return pause

    def _request(self, url: str) -> urllib3.BaseHTTPResponse:
        parts = urlsplit(url)
        pool = self._pools.connection_from_host(parts.hostname, parts.port, parts.scheme)
        return pool.urlopen(
            "GET",
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            headers=self._headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
            timeout=self._config.read_timeout,
        )

    def _note(self, trip: _Trip, response: urllib3.BaseHTTPResponse, picture: bool) -> None:
        """Record the status and the opt-out headers; FetchError `opt_out` where they are to be honoured."""
        trip.status = response.status
        trip.content_type = response.headers.get("Content-Type")
        names = ("X-Robots-Tag", "tdm-reservation", "Content-Usage")
        robots, reservations, usages = ([str(v) for v in response.headers.getlist(name)] for name in names)
        text = optout.recorded(robots, reservations, usages)
        if text:
            trip.opt_outs[text] = None
        reason = optout.opt_out(robots, reservations, usages)
        if reason and picture and self._config.opt_out:
            raise FetchError("opt_out", reason)

    def _read_body(self, response: urllib3.BaseHTTPResponse, picture: bool) -> bytes:
        """The whole body, decoded. A host file is cut at its cap, a picture beyond it is an error."""
        cap = self._config.max_bytes if picture else MAX_FILE
        declared = response.headers.get("Content-Length", "")
        if picture and declared.isdecimal() and len(declared) < 20 and int(declared) > cap:
            raise FetchError("too_large", f"{declared} bytes declared")
        body = bytearray()
        while len(body) <= cap:
            chunk = response.read(_CHUNK)
            if not chunk:
                break
            body += chunk
        decoded = _decoded(bytes(body), response.headers.get("Content-Encoding", ""), cap)
        if len(decoded) > cap and picture:
            raise FetchError("too_large", f"more than {cap} bytes")
        if not decoded:
            raise FetchError("empty", "no bytes")
        return decoded[:cap]


def _fetched(trip: _Trip, body: bytes | None, error: str | None) -> Fetched:
    return Fetched(
        body=body,
        error=error,
        status=trip.status,
        final_url=trip.url,
        content_type=trip.content_type,
        opt_out="; ".join(trip.opt_outs) or None,
        attempts=trip.attempts,
        sha256=hashlib.sha256(body).hexdigest() if body is not None else None,
        bytes=len(body or b""),
        permanent=error is not None and not retryable(error),
    )


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _next_hop(url: str, location: str) -> str:
    with suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")  # http.client reads headers as latin-1
    joined, problem = join_url(url, location)
    if joined is None:
        raise FetchError("redirect_scheme" if problem == "scheme" else "protocol", f"redirect to {location[:100]!r}")
    return joined


def backoff(url: str, retry: int) -> float:
    """Seconds before retry number `retry` (from 0): 0.5 · 2^retry, times 0.5 to 1.5 by a hash of the URL."""
    jitter = int.from_bytes(hashlib.sha256(f"{retry} {url}".encode()).digest()[:4], "big") / 2**32
    return BACKOFF * 2.0**retry * (0.5 + jitter)


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """`Retry-After` in seconds, from seconds or an HTTP date; None when absent or garbage."""
    value = response.headers.get("Retry-After")
    if value is None or (value.strip().isdigit() and len(value.strip()) > 12):
        return None if value is None else _LONGEST
    try:
        return urllib3.Retry(retry_after_max=_LONGEST).parse_retry_after(value)
    except (InvalidHeader, ValueError, OverflowError, TypeError):
        return None


def _decoded(body: bytes, encoding: str, cap: int) -> bytes:
    """Undo one Content-Encoding that the server applied though none was asked for, to at most cap + 1 bytes."""
    name = encoding.strip().lower()
    if name in ("", "identity", "none"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("protocol", f"content-encoding {name[:40]!r}")
    for window in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # gzip or zlib by their headers, then bare deflate
        inflater = zlib.decompressobj(window)
        try:
            plain = inflater.decompress(body, cap + 1)
        except zlib.error:
            continue
        if not inflater.eof and len(plain) <= cap:
            raise FetchError("truncated", "compressed body ends early")
        return plain
    raise FetchError("protocol", f"not {name}")
