"""What the client tries again, how long it waits, and for whom it does not."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from pipeline.fetch.client import backoff, retryable
from pipeline.fetch.limits import HostBusy, HostLimits

from .conftest import HEAD, Handler, Make, Request, Web, after, ok, redirect, reset


@pytest.mark.parametrize(
    "first",
    [
        ok(status="503 Busy"),
        ok(status="500 Oops"),
        ok(status="429 Slow"),
        reset(b""),
        after(HEAD + b"Content-Length: 99\r\n\r\nx", lambda link, _: None),
    ],
)
def test_what_can_succeed_is_tried_again(
    client: Make, web: Web, first: bytes | Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.fetch.client.BACKOFF", 0.1)

    def flaky(link: socket.socket, request: Request) -> None:
        if len(web.asked("/x")) <= 2:
            link.sendall(first) if isinstance(first, bytes) else first(link, request)
        else:
            link.sendall(ok())

    web.pages["/x"] = flaky
    fetched = client(retries=2).fetch("http://a.web.test/x")
    assert (fetched.body, fetched.attempts) == (b"picture", 3)
    times = [request.at for request in web.log]
    assert times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked", [(), ("Retry-After: 7",)])
def test_a_busy_host_is_held_before_another_process_has_its_turn(
    client: Make, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, asked: tuple[str, ...]
) -> None:
    held: list[tuple[str, float, int]] = []
    plain = HostLimits.hold

    def hold(limits: HostLimits, host: str, seconds: float, status: int) -> None:
        with pytest.raises(HostBusy), HostLimits(tmp_path / "limits/hosts", 1, 1e4).turn(host, 0):
            pass
        held.append((host, seconds, status))
        plain(limits, host, min(seconds, 0.01), status)

    monkeypatch.setattr(HostLimits, "hold", hold)
    web.pages["a.web.test/x"] = redirect("http://b.web.test/x")
    web.pages["b.web.test/x"] = ok(b"", *asked, status=f"{status} Busy")
    fetched = client(retries=2, per_host_connections=1, max_wait=60).fetch("http://a.web.test/x")
    assert (fetched.error, fetched.attempts) == (f"http_{status}", 3)
    pauses = [7 if asked else backoff("http://b.web.test/x", retry) for retry in range(3)]
    assert held == [("b.web.test", pause, status) for pause in pauses]


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_broken_host_may_not_ask_to_wait(
    client: Make, web: Web, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("pipeline.fetch.client.BACKOFF", 0.05)
    web.pages["/x"] = ok(b"", "Retry-After: 600", status=f"{status} Broken")
    assert client(retries=1).fetch("http://a.web.test/x").attempts == 2
    web.pages["/y"] = ok()
    assert client(max_wait=1).fetch("http://a.web.test/y").body == b"picture"


def test_a_full_disk_of_ours_is_not_the_servers_fault(client: Make, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(HostLimits, "hold", full)
    web.pages["/x"] = ok(status="503 Busy")
    with pytest.raises(OSError, match="no space left"):
        client().fetch("http://a.web.test/x")


@pytest.mark.parametrize("page", [ok(status="404 No"), ok(status="403 No"), ok(b""), redirect("/x"), ok(b"x" * 9999)])
def test_what_cannot_succeed_is_not(client: Make, web: Web, page: bytes) -> None:
    web.pages["/x"] = page
    assert client(retries=5, max_bytes=99).fetch("http://a.web.test/x").attempts == 1
    assert len(web.log) == 1


def test_a_host_known_to_be_out_of_reach_is_not_tried_again(client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.fetch.client.BACKOFF", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    careful = client(robots=True, retries=2, connect={"gone.test": f"127.0.0.1:{port}"})
    for name in ("one", "two"):  # robots.txt was asked for three times, and what came of it is remembered
        fetched = careful.fetch(f"http://gone.test/{name}")
        assert (fetched.error, fetched.attempts) == ("connect: connection refused", 1)


def test_retryable_codes() -> None:
    for error in (
        "timeout",
        "timeout: reading",
        "reset",
        "truncated: x",
        "http_429",
        "http_503: x",
        "connect: refused",
        "dns: temporary failure",
        "robots: unreachable: http_503",
    ):
        assert retryable(error)
    for error in (
        "http_404",
        "robots: disallowed",
        "opt_out: x",
        "blocked_address: x",
        "invalid_url",
        "scheme",
        "tls: x",
        "dns: no such host",
        "too_large",
        "empty",
        "redirect_loop",
        "redirect_scheme",
        "protocol",
    ):
        assert not retryable(error)


def test_backoff_is_bounded_and_repeats() -> None:
    waits = [backoff(f"http://x.test/{n}", retry) / 2**retry for n in range(200) for retry in range(3)]
    assert 0.25 <= min(waits) < 0.3 and 0.7 < max(waits) <= 0.75
    assert waits == [backoff(f"http://x.test/{n}", retry) / 2**retry for n in range(200) for retry in range(3)]
