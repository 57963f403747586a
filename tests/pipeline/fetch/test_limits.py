"""Per-host limits hold across threads and processes, and cost nothing for a host that is free."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from pipeline.fetch import FetchConfig
from pipeline.fetch.client import Client
from pipeline.fetch.limits import HostBusy, HostLimits

from .conftest import Web, ok


def fetch_all(settings: dict[str, Any], folder: Path, urls: list[str], results: Any) -> None:
    one = Client(FetchConfig.model_validate(settings), folder)
    with ThreadPoolExecutor(8) as pool:
        results.put([(fetched.error, fetched.attempts) for fetched in pool.map(one.fetch, urls)])


def in_processes(count: int, web: Web, folder: Path, urls: list[str], **settings: Any) -> list[tuple[str | None, int]]:
    """Fetch `urls` in each of `count` fresh processes at once."""
    settings = {"robots": False, "opt_out": False, "connect": web.connect} | settings
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=fetch_all, args=(settings, folder, urls, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [result for _ in processes for result in results.get(timeout=30)]
    for process in processes:
        process.join()
    return found


def test_rate_and_connections_across_processes(web: Web, tmp_path: Path) -> None:
    def slow(link: Any, _: Any) -> None:
        time.sleep(0.06)
        link.sendall(ok())

    web.pages["/x"] = slow
    urls = [f"http://{host}.web.test/x" for _ in range(10) for host in ("a", "b")]
    results = in_processes(2, web, tmp_path, urls, per_host_rate=20, per_host_connections=2, max_wait=20)
    assert results == [(None, 1)] * 40
    for host in ("a.web.test", "b.web.test"):
        times = [request.at for request in web.log if request.host == host]
        assert len(times) == 20
        assert times[-1] - times[0] >= 19 / 20 - 0.05
        assert min(later - sooner for sooner, later in zip(times, times[3:], strict=False)) > 0.05  # 3 gaps of 50 ms
    assert max(request.others for request in web.log) <= 2  # two at once; one may be seen as it ends


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_in_every_process(web: Web, tmp_path: Path, as_date: bool) -> None:
    refused: list[float] = []

    def busy_once(link: Any, request: Any) -> None:
        if not refused:
            refused.append(time.time())
            value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
            link.sendall(ok(b"", f"Retry-After: {value}", status="429 Too Many Requests"))
        else:
            link.sendall(ok())

    web.pages["/x"] = busy_once
    results = in_processes(
        2, web, tmp_path, ["http://a.web.test/x"] * 6, per_host_connections=1, per_host_rate=100, retries=1
    )
    assert sorted(attempts for _, attempts in results) == [1] * 11 + [2]
    assert {error for error, _ in results} == {None}
    gaps = [request.at - web.log[0].at for request in web.log[1:]]
    assert len(gaps) == 12 and min(gaps) >= 0.99  # no early request, from either process


def test_a_longer_wish_than_the_cap_gives_up_at_once(client: Callable[..., Client], web: Web) -> None:
    for value in ("600", "1000000000", "9" * 5000, formatdate(time.time() + 3600, usegmt=True)):
        host = f"h{abs(hash(value))}.web.test"
        web.pages["/x"] = ok(b"", f"Retry-After: {value}", status="503 Busy")
        start = time.monotonic()
        one = client(retries=3, max_wait=5)
        first, second = one.fetch(f"http://{host}/x"), one.fetch(f"http://{host}/y")
        assert time.monotonic() - start < 1
        assert (first.error, first.attempts, first.permanent) == ("http_503", 1, False)
        assert (second.error or "").startswith("http_503: the host asks to wait") and second.status == 503
        third = one.fetch(f"http://{host}/z")  # our refusal to wait is no new wish of the host
        assert value != "600" or "86400" not in (third.error or "")
        assert [request.path for request in web.log if request.host == host] == ["/x"]


@pytest.mark.parametrize(
    "value", ["soon", "", "-5", "1.5", "1e3", "Wed, 99 Foo 2099", "\x00", "Thu, 01 Jan 1970 00:00:00 GMT", "٣"]
)
def test_garbage_is_as_none(
    client: Callable[..., Client], web: Web, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.fetch.client.BACKOFF", 0.05)

    def busy_once(link: Any, _: Any) -> None:
        link.sendall(ok() if len(web.log) > 1 else ok(b"", f"Retry-After: {value}", status="429 Slow"))

    web.pages["/x"] = busy_once
    fetched = client(retries=1, max_wait=2).fetch("http://a.web.test/x")
    assert (fetched.body, fetched.attempts) == (b"picture", 2)


def test_waiting_is_not_counted_as_talking(client: Callable[..., Client], web: Web) -> None:
    web.pages["/x"] = ok()
    one = client(per_host_rate=4, total_timeout=0.3)
    with ThreadPoolExecutor(6) as pool:
        assert all(fetched.body for fetched in pool.map(one.fetch, ["http://a.web.test/x"] * 6))


def test_waiting_is_bounded(client: Callable[..., Client], web: Web) -> None:
    web.pages["/x"] = ok()
    one = client(per_host_rate=1, max_wait=0.2)
    start = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        errors = [fetched.error for fetched in pool.map(one.fetch, ["http://a.web.test/x"] * 6)]
    assert errors.count(None) == 1 and all(error is None or error.startswith("timeout") for error in errors)
    assert time.monotonic() - start < 1


def test_a_dead_process_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=take_and_hang, args=(tmp_path,))
    process.start()
    while not (tmp_path / "taken").exists():
        time.sleep(0.01)
    limits = HostLimits(tmp_path, 1, 1000.0)
    with pytest.raises(HostBusy), limits.turn("a", 0.1):
        pass
    process.kill()
    process.join()
    with limits.turn("a", 0.5):
        pass


def take_and_hang(folder: Path) -> None:
    with HostLimits(folder, 1, 1000.0).turn("a", 1.0):
        (folder / "taken").touch()
        time.sleep(60)


def test_a_hold_reaches_those_already_waiting(tmp_path: Path) -> None:
    limits = HostLimits(tmp_path, 4, 5.0)
    started: list[float] = []

    def work() -> None:
        with limits.turn("a", 10.0):
            started.append(time.monotonic())

    with limits.turn("a", 1.0):
        start = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        limits.hold("a", 0.8, 503)
    for thread in threads:
        thread.join()
    assert min(started) - start >= 0.85
    assert started[1] - started[0] >= 0.19  # and they keep the rate afterwards


def test_a_clock_set_back_does_not_stop_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = HostLimits(tmp_path, 1, 1.0)
    limits.hold("a", 1e9, 503)
    with pytest.raises(HostBusy) as busy, limits.turn("a", 1.0):
        pass
    assert busy.value.status == 503
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 365 * 86_400)
    with limits.turn("a", 1.0):
        pass


def test_overhead_per_request(tmp_path: Path) -> None:
    """Under 0.3 ms of this process, for hosts that are free, new or known; the bound here is loose."""
    limits = HostLimits(tmp_path, 4, 1e6)
    start = time.process_time()
    for number in range(1000):
        with limits.turn(f"host{number % 500}.test", 1.0):
            pass
    each = (time.process_time() - start) / 1000
    print(f"{each * 1e6:.0f} µs per turn")
    assert each < 0.003
