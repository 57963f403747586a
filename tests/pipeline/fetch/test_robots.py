"""robots.txt by RFC 9309, its Content-Usage lines, and TDMRep: no forbidden request ever reaches the server."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.fetch.guard import FetchError
from pipeline.fetch.robots import FRESH, FRESH_FAILURE, HostWishes, parse_tdmrep, reserved, usage_rules

from .conftest import Make, Web, ok, redirect


class Host:
    """A host of which only its files are known; counts how often each is asked for."""

    def __init__(
        self,
        folder: Path,
        file: bytes | FetchError,
        tdm: bytes | None = None,
        robots: bool = True,
        opt_out: bool = True,
    ) -> None:
        self.files: dict[str, bytes | FetchError] = {"/robots.txt": file}
        self.files["/.well-known/tdmrep.json"] = tdm or FetchError("http_404")
        self.asked: list[str] = []
        self.wishes = HostWishes(folder, self.get, robots, opt_out)

    def get(self, url: str) -> bytes:
        self.asked.append(url)
        answer = self.files[url.removeprefix("http://x.test")]
        if isinstance(answer, FetchError):
            raise answer
        return answer

    def verdict(self, path: str) -> str | None:
        try:
            self.wishes.check(f"http://x.test{path}")
        except FetchError as error:
            return str(error)
        return None


RULES = """
User-agent: *
Disallow: /
User-agent: other
User-agent: Headrace
Disallow: /private
Allow: /private/shared
Disallow: /*.gif$
Disallow: /a%3Cd
Disallow: /*?session=
Allow: /p
Disallow: /p
Disallow: /äpfel
"""
CASES = [
    ("/", True),
    ("/private", False),
    ("/private/x", False),
    ("/privateer", False),
    ("/private/shared/x", True),
    ("/x.gif", False),
    ("/x.gif?y", True),
    ("/x.gif.jpg", True),
    ("/a%3cd", False),
    ("/x?session=1", False),
    ("/x?a&session=1", True),
    ("/p", True),
    ("/Private", True),
    ("/%C3%A4pfel", False),
    ("/robots.txt", True),
]


@pytest.mark.parametrize(("path", "allowed"), CASES)
def test_the_longest_rule_of_our_group(tmp_path: Path, path: str, allowed: bool) -> None:
    assert Host(tmp_path, RULES.encode()).verdict(path) == (None if allowed else "robots: disallowed")


def test_random_rules_against_a_plain_reading(tmp_path: Path) -> None:
    """The longest matching rule wins, Allow at a tie (RFC 9309, 2.2.2), by an independent matcher."""
    rng = random.Random(5)

    def matches(rule: str, path: str) -> bool:
        head, *tail = rule.removesuffix("$").split("*")
        if not path.startswith(head):
            return False
        ends = {len(head)}
        for part in tail:
            ends = {i + len(part) for end in ends for i in range(end, len(path) + 1) if path.startswith(part, i)}
        return bool(ends) if not rule.endswith("$") else len(path) in ends or (rule.endswith("*$") and bool(ends))

    for number in range(150):
        rules = [
            (
                rng.choice(("Allow", "Disallow")),
                "/" + "".join(rng.choices("ab/*", k=rng.randrange(5))) + rng.choice(("", "$")),
            )
            for _ in range(4)
        ]
        text = "User-agent: headrace\n" + "".join(f"{verb}: {rule}\n" for verb, rule in rules)
        host = Host(tmp_path / str(number), text.encode(), opt_out=False)
        for _ in range(4):
            path = "/" + "".join(rng.choices("ab/", k=rng.randrange(5)))
            hits = [(len(rule), verb == "Allow") for verb, rule in rules if matches(rule, path)]
            want = None if not hits or max(hits)[1] else "robots: disallowed"
            assert host.verdict(path) == want, (text, path)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 451, 499])
def test_4xx_allows(tmp_path: Path, status: int) -> None:
    assert Host(tmp_path, FetchError(f"http_{status}")).verdict("/x") is None


@pytest.mark.parametrize(
    "code", ["http_500", "http_502", "http_503", "http_599", "http_429", "timeout", "reset", "truncated", "protocol"]
)
def test_unreachable_forbids(tmp_path: Path, code: str) -> None:
    host = Host(tmp_path, FetchError(code))
    assert host.verdict("/x") == f"robots: unreachable: {code}"
    assert host.asked == ["http://x.test/robots.txt"]


@pytest.mark.parametrize("code", ["dns", "connect", "tls", "blocked_address"])
def test_what_would_be_the_pictures_own_fate_is(tmp_path: Path, code: str) -> None:
    assert Host(tmp_path, FetchError(code, "why")).verdict("/x") == f"{code}: why"


@pytest.mark.parametrize(
    "body", [b"<html>soft 404</html>", b"", b"\xff\xfe\0", b"\xef\xbb\xbfUser-agent: *\nAllow: /", b"\0" * 999]
)
def test_strange_files_allow(tmp_path: Path, body: bytes) -> None:
    assert Host(tmp_path, body).verdict("/x") is None


def test_a_byte_order_mark_hides_no_rule(tmp_path: Path) -> None:
    assert Host(tmp_path, b"\xef\xbb\xbfUser-agent: *\r\nDisallow: /").verdict("/x") == "robots: disallowed"


def test_asked_once_by_all_threads_and_processes(tmp_path: Path) -> None:
    first = Host(tmp_path, b"User-agent: *\nDisallow: /x", b"[]")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(first.verdict, ["/x"] * 50)) == {"robots: disallowed"}
    second = Host(tmp_path, b"")  # another process, as far as the folder can tell
    assert second.verdict("/x") == "robots: disallowed"
    assert (len(first.asked), second.asked) == (2, [])


@pytest.mark.parametrize(
    ("robots", "age"), [(b"User-agent: *\nDisallow: /x", FRESH), (FetchError("http_503"), FRESH_FAILURE)]
)
def test_asked_again_after_its_time(
    tmp_path: Path, robots: bytes | FetchError, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, now = Host(tmp_path, robots), time.time
    assert host.verdict("/x") is not None
    host.files["/robots.txt"] = b""
    monkeypatch.setattr(time, "time", lambda: now() + age - 60)
    assert host.verdict("/x") is not None
    monkeypatch.setattr(time, "time", lambda: now() + age + 60)
    assert host.verdict("/x") is None


def test_a_half_written_copy_is_fetched_again(tmp_path: Path) -> None:
    Host(tmp_path, b"").verdict("/x")
    [copy] = tmp_path.glob("*/*.json")
    for junk in ('{"expires": 1e99', "", "[]", '{"expires": 1e99}', "nonsense"):
        copy.write_text(junk)
        assert Host(tmp_path, b"User-agent: *\nDisallow: /").verdict("/x") == "robots: disallowed"


def test_flags(tmp_path: Path) -> None:
    forbid, reserve = b"User-agent: *\nDisallow: /", b'[{"location": "/", "tdm-reservation": 1}]'
    neither = Host(tmp_path / "a", forbid, reserve, robots=False, opt_out=False)
    assert (neither.verdict("/x"), neither.asked) == (None, [])
    assert Host(tmp_path / "b", forbid, reserve, robots=False).verdict("/x") == "opt_out: tdmrep.json"
    assert Host(tmp_path / "c", forbid, reserve, opt_out=False).asked == []
    assert Host(tmp_path / "d", b"", reserve, opt_out=False).verdict("/x") is None


TDM = [
    ([("/", 1)], "/x", True),
    ([("/", 0)], "/x", False),
    ([("/img/*", 1)], "/img/x.jpg", True),
    ([("/img/*", 1)], "/other", False),
    ([("*.jpg$", 1)], "/a/b.jpg", True),
    ([("*.jpg$", 1)], "/a/b.jpg.png", False),
    ([("img/", 1)], "/img/x", True),
    ([("/open/", 0), ("/", 1)], "/open/x", False),
    ([("/open/", 0), ("/", 1)], "/x", True),
    ([("/", 1), ("/open/", 0)], "/open/x", True),  # the first match reserves
    ([("/", 0), ("/closed/", 1)], "/closed/x", True),  # the longest match reserves
    ([("/a#b", 1)], "/a%23b", True),
]


@pytest.mark.parametrize(("rules", "path", "want"), TDM)
def test_tdmrep_rules(rules: list[tuple[str, int]], path: str, want: bool) -> None:
    text = json.dumps([{"location": location, "tdm-reservation": flag} for location, flag in rules])
    assert reserved(parse_tdmrep(text), f"http://x.test{path}") == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1, null, []]",
        "[" * 100_000,
        '[{"location": 1}]',
        '[{"location": ""}]',
        "<html>",
        '[{"location": "/\\nDisallow: /", "tdm-reservation": 1}]',
        '{"location": "/", "tdm-reservation": 1}',
    ],
)
def test_malformed_tdmrep_is_no_reservation(text: str) -> None:
    assert not reserved(parse_tdmrep(text), "http://x.test/y")


USAGE = """
User-agent: *
Content-Usage: train-ai=y
User-agent: headrace
Allow: /
Content-Usage: train-ai=n
Content-Usage: /open/ train-ai=y, search=n
Content-Usage: /closed search=n
"""


def test_content_usage_lines(tmp_path: Path) -> None:
    host = Host(tmp_path, USAGE.encode())
    assert [host.verdict(path) for path in ("/x", "/open/x", "/closed")] == [
        "opt_out: robots.txt Content-Usage",
        None,
        "opt_out: robots.txt Content-Usage",
    ]
    assert Host(tmp_path / "b", USAGE.replace("headrace", "other").encode()).verdict("/x") is None
    assert "Allow: /open/" in usage_rules(USAGE)


def test_over_the_wire(client: Make, web: Web) -> None:
    web.pages |= {
        "a.web.test/robots.txt": ok(b"User-agent: headrace\nDisallow: /no"),
        "b.web.test/robots.txt": ok(b"", status="503 Busy"),
        "c.web.test/robots.txt": redirect("//d.web.test/1"),
        **{f"d.web.test/{n}": redirect(f"/{n + 1}") for n in range(1, 5)},
        "d.web.test/5": ok(b"User-agent: *\nDisallow: /no"),
        "e.web.test/robots.txt": redirect("/robots.txt"),
        "f.web.test/robots.txt": ok(b"User-agent: *\nDisallow: /no\n" + b"#" * 600_000 + b"\nDisallow: /late"),
        "g.web.test/.well-known/tdmrep.json": ok(b'[{"location": "/no*", "tdm-reservation": 1}]'),
        "/no": ok(),
        "/late": ok(),
        "/to": redirect("http://a.web.test/no"),
    }
    polite = client(robots=True, opt_out=True, total_timeout=5)
    errors = {host: polite.fetch(f"http://{host}.web.test/no").error for host in "abcefgh"}
    assert errors.pop("b") == "robots: unreachable: http_503"
    assert errors == {
        "a": "robots: disallowed",
        "c": "robots: disallowed",
        "e": None,
        "f": "robots: disallowed",
        "g": "opt_out: tdmrep.json",
        "h": None,
    }
    assert polite.fetch("http://f.web.test/late").body  # beyond 500 KiB
    assert polite.fetch("http://h.web.test/to").error == "robots: disallowed"  # every hop is asked for
    assert {request.host for request in web.asked("/no")} == {"e.web.test", "h.web.test"}
    assert all(len(web.asked(f"{host}.web.test/robots.txt")) == 1 for host in "abcfgh")


def test_a_robots_file_that_drips_forbids(client: Make, web: Web) -> None:
    def drip(link: socket.socket, _: Any) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            link.sendall(b"#")
            time.sleep(0.05)

    web.pages |= {"/robots.txt": drip, "/x": ok()}
    start = time.monotonic()
    fetched = client(robots=True, total_timeout=0.6).fetch("http://a.web.test/x")
    assert (fetched.error or "").startswith("robots: unreachable: timeout") and not fetched.permanent
    assert time.monotonic() - start < 1.6 and web.asked("/x") == []


def test_hostile_rules_take_no_time(tmp_path: Path) -> None:
    rules = "User-agent: *\n" + "Disallow: /*a*a*a*a*a*a*a*b\n" * 15_000
    host = Host(tmp_path, rules.encode()[:500_000])
    start = time.monotonic()
    assert host.verdict("/" + "a" * 2000) is None
    assert time.monotonic() - start < 3
