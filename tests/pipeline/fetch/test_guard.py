"""Address tables, URL spellings and the exemption: what may be connected to."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable

import pytest

from pipeline.fetch.client import Client
from pipeline.fetch.guard import exemption, join_url, normalise_url, parse_exemption, refusal

from .conftest import Web, ok, redirect

# First, last and one inside of each, and the neighbours outside that are public (None: no public neighbour).
RANGES = [
    ("0.0.0.0", "0.255.255.255", None, "1.0.0.0"),
    ("10.0.0.0", "10.255.255.255", "9.255.255.255", "11.0.0.0"),
    ("100.64.0.0", "100.127.255.255", "100.63.255.255", "100.128.0.0"),
    ("127.0.0.0", "127.255.255.255", "126.255.255.255", "128.0.0.0"),
    ("168.63.129.16", "168.63.129.16", "168.63.129.15", "168.63.129.17"),
    ("169.254.0.0", "169.254.255.255", "169.253.255.255", "169.255.0.0"),
    ("172.16.0.0", "172.31.255.255", "172.15.255.255", "172.32.0.0"),
    ("192.0.0.0", "192.0.0.255", "191.255.255.255", "192.0.1.0"),
    ("192.0.2.0", "192.0.2.255", "192.0.1.255", "192.0.3.0"),
    ("192.88.99.0", "192.88.99.255", "192.88.98.255", "192.88.100.0"),
    ("192.168.0.0", "192.168.255.255", "192.167.255.255", "192.169.0.0"),
    ("198.18.0.0", "198.19.255.255", "198.17.255.255", "198.20.0.0"),
    ("198.51.100.0", "198.51.100.255", "198.51.99.255", "198.51.101.0"),
    ("203.0.113.0", "203.0.113.255", "203.0.112.255", "203.0.114.0"),
    ("224.0.0.0", "255.255.255.255", "223.255.255.255", None),
    ("::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, None),
    ("2001::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", "2000:ffff::", "2001:200::"),
    ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db7:ffff::1", "2001:db9::"),
    ("2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2001:ffff::1", "2003::"),
    ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", "3ffd::1", "3fff:1000::"),
    ("4000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None, None),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::200e", "64:ff9b::808:808"]
PRIVATE = [
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "::1",
    "::",
    "::ffff:8.8.8.8",
    "::8.8.8.8",
    "64:ff9b:1::8.8.8.8",
    "2001:0:53aa:64c:0:fbff:f5ff:fffe",
    "5f00::1",
    "fec0::1",
    "",
    "example.com",
    "127.1",
]
INNER = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "192.168.1.1",
    "172.16.0.1",
    "100.100.100.200",
    "0.0.0.0",
    "168.63.129.16",
]


def table() -> list[tuple[str, bool]]:
    """Several hundred addresses, and whether each may be connected to."""
    rows: list[tuple[str, bool]] = [(address, True) for address in PUBLIC] + [(address, False) for address in PRIVATE]
    rng = random.Random(7)
    for first, last, before, after in RANGES:
        kind = type(ipaddress.ip_address(first))
        low, high = int(ipaddress.ip_address(first)), int(ipaddress.ip_address(last))
        inside = {low, high, *(rng.randint(low, high) for _ in range(12))}
        rows += [(str(kind(value)), False) for value in sorted(inside) if value >> 32 != 0x64FF9B << 72]
        rows += [(address, True) for address in (before, after) if address]
    for text in INNER:
        value = int(ipaddress.IPv4Address(text))
        forms = [0xFFFF << 32 | value, value, 0x2002 << 112 | value << 80, 0x20010000 << 96 | (value ^ 0xFFFFFFFF)]
        forms += [0x64FF9B << 96 | value, 0x64FF9B0001 << 80 | value]
        rows += [(str(ipaddress.IPv6Address(form)), False) for form in forms]
    return rows


def test_the_table_is_large() -> None:
    assert len(table()) > 300


@pytest.mark.parametrize(("address", "public"), table())
def test_addresses(address: str, public: bool) -> None:
    assert (refusal(address) is None) == public


@pytest.mark.parametrize(
    ("url", "want"),
    [
        ("http://x.test/a b,c.jpg", "http://x.test/a%20b,c.jpg"),
        ("  http://x.test/a\n", "http://x.test/a"),
        ("HTTPS://X.Test:443/é?q=ü#f", "https://x.test/%C3%A9?q=%C3%BC"),
        ("http://bücher.test/", "http://xn--bcher-kva.test/"),
        ("http://u:p@x.test/", "http://x.test/"),
        ("http://x.test\\@127.0.0.1/", "http://x.test/@127.0.0.1/"),
        ("http://good.test@127.0.0.1/", "http://127.0.0.1/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://017700000001/", "http://127.0.0.1/"),
        ("http://127.1/", "http://127.0.0.1/"),
        ("http://１２７.0.0.1/", "http://127.0.0.1/"),
        ("http://127.0.0.1./", "http://127.0.0.1/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://x.test/%zz", "http://x.test/%zz"),
        ("http://x.test", "http://x.test/"),
    ],
)
def test_normalised_urls(url: str, want: str) -> None:
    assert normalise_url(url) == (want, None)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "//x.test/",
        "http://",
        "http:// /",
        "http://a b/",
        "http://x.test:99999/",
        "http://x..test/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        f"http://{'a' * 64}.test/",
        f"http://{'abc.' * 80}test/",
        "http://x.test/\ud800",
        "http://[::1/",
        "http://x.test:0/",
        "http://x.test/" + "a" * 20_000,
        "http://\0/",
    ],
)
def test_invalid_urls(url: str) -> None:
    assert normalise_url(url) == (None, "invalid_url")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x.test/", "data:image/png;base64,AA", "javascript:1", "gopher://x.test/"]
)
def test_other_schemes(url: str) -> None:
    assert normalise_url(url) == (None, "scheme")


def test_joined_urls() -> None:
    assert join_url("http://x.test/a/b", "../c d") == ("http://x.test/c%20d", None)
    assert join_url("https://x.test/a", "//y.test/z") == ("https://y.test/z", None)
    assert join_url("https://x.test/a", "file:///etc") == (None, "scheme")


def test_exemptions() -> None:
    connect = {"*.mini.test": ("127.0.0.1", 1), "a.mini.test": ("127.0.0.1", 2), "localhost": ("127.0.0.1", 3)}
    assert [exemption(host, connect) for host in ("b.mini.test", "c.b.mini.test", "a.mini.test", "localhost")] == [
        ("127.0.0.1", 1),
        ("127.0.0.1", 1),
        ("127.0.0.1", 2),
        ("127.0.0.1", 3),
    ]
    for host in ("mini.test", "xmini.test", "mini.test.evil.test", "127.0.0.1", "test", ""):
        assert exemption(host, connect) is None
    assert parse_exemption("*.x.test", "[::1]:80") == ("::1", 80)
    for pattern, address in (
        ("*", "127.0.0.1:1"),
        ("a*.x", "127.0.0.1:1"),
        ("x", "localhost:1"),
        ("x", "127.0.0.1"),
        ("x", "1.1.1.1:0"),
    ):
        with pytest.raises(ValueError, match=r"not"):
            parse_exemption(pattern, address)


class Canary:
    """A loopback port that remembers whether anything ever connected."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.port: int = self._socket.getsockname()[1]

    def touched(self) -> bool:
        try:
            self._socket.accept()[0].close()
            return True
        except TimeoutError:
            return False
        finally:
            self._socket.close()


def spellings(port: int) -> list[str]:
    hosts = [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "127.0.0.1.",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "0.0.0.0",
        "0",
        "[::]",
        "①②⑦.0.0.1",
        "127.0.0.1%2e",
        "LOCALHOST",
        "u@127.0.0.1",
        "x.web.test@127.0.0.1",
    ]
    return [f"http://{host}:{port}/" for host in hosts]


@pytest.mark.parametrize("number", range(len(spellings(1))))
def test_nothing_reaches_loopback(client: Callable[..., Client], web: Web, number: int) -> None:
    canary = Canary()
    url = spellings(canary.port)[number]
    web.pages["/there"] = redirect(url)
    web.pages["/chain"] = redirect("/there", "308 Permanent Redirect")
    fetch = client().fetch
    errors = [fetch(u).error for u in (url, "http://a.web.test/there", "http://a.web.test/chain")]
    assert not canary.touched()
    assert all(error and error.startswith(("blocked_address", "dns", "invalid_url", "protocol")) for error in errors)


def test_a_name_that_changes_between_look_ups(client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: no second look-up could say loopback; of mixed answers only the public address is used."""
    canary, asked, dialled = Canary(), list[str](), list[object]()
    answers = [["8.8.8.8"], ["127.0.0.1"], ["127.0.0.1", "8.8.4.4", "::1"]]

    def look_up(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        return [(0, 0, 0, "", (address, port)) for address in answers[min(len(asked), 3) - 1]]

    def dial(self: socket.socket, address: object) -> None:
        dialled.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("pipeline.fetch.wire._PlainSocket.connect", dial, raising=False)
    fetch = client().fetch
    errors = [fetch(f"http://rebind.example:{canary.port}/").error for _ in range(3)]
    assert errors == [
        "connect: connection refused",
        "blocked_address: 127.0.0.1 is loopback",
        "connect: connection refused",
    ]
    assert len(asked) == 3 and dialled == [("8.8.8.8", canary.port), ("8.8.4.4", canary.port)]
    assert not canary.touched()


def test_the_exemption_is_for_exactly_one_port(client: Callable[..., Client], web: Web) -> None:
    web.pages["/x"] = ok()
    assert client().fetch(f"http://127.0.0.1:{web.port}/x").error == "blocked_address: 127.0.0.1 is loopback"
    assert client().fetch("http://a.web.test:1/x").body == b"picture"  # its own port is not used
    assert client().fetch("http://web.test/x").error is not None


def test_environment_proxies_are_ignored(
    client: Callable[..., Client], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = Canary()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    web.pages["/x"] = ok()
    assert client().fetch("http://a.web.test/x").body == b"picture"
    assert not canary.touched()
