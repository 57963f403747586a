"""Which URLs and which addresses may be contacted: http(s) to public unicast addresses, and nothing else.

The rule is applied to the address a socket is about to be connected to, after resolution, so neither a spelling
(decimal, octal, hex, IPv6-embedded) nor a name that resolves inwards, nor one that changes between two look-ups, gets
past it. It knows nothing of HTTP.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

import can_ada

Address = tuple[str, int]  # a literal address and a port

MAX_URL: Final = 16_384  # characters

# IANA special-purpose registries (RFC 6890 and updates), multicast, and the one cloud-internal service that sits on a
# public address (Azure's 168.63.129.16).
_DENIED_V4: Final = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "cloud metadata",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
# Inside 2000::/3, the only space of global unicast; everything outside it is denied as a whole.
_DENIED_V6: Final = {
    "2001::/32": "Teredo",
    "2001::/23": "protocol assignments",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3ffe::/16": "6bone",
    "3fff::/20": "documentation",
}
_NAMED_V6: Final = {
    "::1/128": "loopback",
    "::/128": "unspecified",
    "::ffff:0:0/96": "IPv4-mapped",
    "::/96": "IPv4-compatible",
    "64:ff9b:1::/48": "local NAT64",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
_V4: Final = [(IPv4Network(net), name) for net, name in _DENIED_V4.items()]
_V6: Final = [(IPv6Network(net), name) for net, name in (_NAMED_V6 | _DENIED_V6).items()]
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")

_PATTERN: Final = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[?[0-9a-f:]+\]?")


class FetchError(Exception):
    """One fetch failed: `code` is a stable token, `detail` says more, `retry_after`: seconds its host is left alone."""

    def __init__(self, code: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.retry_after = retry_after


def normalise_url(url: str) -> tuple[str, None] | tuple[None, str]:
    """`(url, None)` as a browser would request it (WHATWG: percent-encoded, IDNA, numeric hosts as dotted IPv4, no
    credentials, no fragment), or `(None, "invalid_url" | "scheme")`."""
    return _checked(url, None)


def join_url(base: str, location: str) -> tuple[str, None] | tuple[None, str]:
    """As `normalise_url`, for a `Location` relative to `base`."""
    return _checked(location, base)


def _checked(url: str, base: str | None) -> tuple[str, None] | tuple[None, str]:
    if len(url) > MAX_URL:
        return None, "invalid_url"
    try:
        parsed = can_ada.parse(url) if base is None else can_ada.parse(base) + url
        if parsed.protocol not in ("http:", "https:"):
            return None, "scheme"
        parsed.username = parsed.password = parsed.hash = ""
        host = str(parsed.hostname)
        name_ok = len(host) <= 253 and all(0 < len(part) < 64 for part in host.removesuffix(".").split("."))
        if parsed.port == "0" or not (name_ok or host.startswith("[")):
            return None, "invalid_url"
        return str(parsed.href), None
    except (ValueError, TypeError, UnicodeError):  # TypeError: lone surrogates
        return None, "invalid_url"


def refusal(address: str) -> str | None:
    """Why a literal IP address may not be connected to, or None for a public unicast one.

    NAT64's well-known prefix is judged by the IPv4 address it carries; every other transition form (6to4, Teredo,
    mapped, compatible) is refused, whatever it carries.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "not an address"  # also what a scope id (fe80::1%eth0) ends as
    if isinstance(ip, IPv4Address):
        return _first(ip)
    if ip.scope_id is not None:
        return "link-local"
    if ip in _NAT64:
        inner = _first(IPv4Address(int(ip) & 0xFFFFFFFF))
        return f"NAT64 of {inner}" if inner else None
    named = next((name for net, name in _V6 if ip in net), None)
    return named or (None if ip in _GLOBAL_V6 else "not global unicast")


def _first(ip: IPv4Address) -> str | None:
    return next((name for net, name in _V4 if ip in net), None)


def parse_exemption(pattern: str, address: str) -> Address:
    """`("*.miniweb.test", "127.0.0.1:8000")` → `("127.0.0.1", 8000)`; ValueError names what is wrong with it."""
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"{pattern!r} is not a host name or *.suffix, in lower case")
    host, _, port = address.rpartition(":")
    try:
        ip: IPv4Address | IPv6Address = ipaddress.ip_address(host.strip("[]"))
        if not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise ValueError(f"{address!r} is not ADDRESS:PORT, for instance 127.0.0.1:8000") from None
    return str(ip), int(port)


def exemption(host: str, connect: Mapping[str, Address]) -> Address | None:
    """The address that stands for `host`: an exact entry of `connect`, else the longest `*.suffix` it ends in."""
    if host in connect:
        return connect[host]
    labels = host.split(".")
    suffixes = ("*." + ".".join(labels[i:]) for i in range(1, len(labels)))
    return next((connect[suffix] for suffix in suffixes if suffix in connect), None)


def permitted_addresses(host: str, port: int, connect: Mapping[str, Address], timeout: float) -> list[Address]:
    """Addresses to try for `host`, each already checked. Raises FetchError `dns`, `timeout` or `blocked_address`."""
    exempt = exemption(host, connect)
    if exempt is not None:
        return [exempt]
    found = _resolve(host.strip("[]"), port, timeout)
    permitted = [address for address in found if refusal(address) is None]
    if not permitted:
        raise FetchError("blocked_address", f"{found[0]} is {refusal(found[0])}" if found else "no address")
    return [(address, port) for address in permitted]


def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """Look up `host` once, for at most `timeout` seconds (getaddrinfo has no time limit of its own)."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    found: list[str] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(row[4][0]) for row in rows))
        except (OSError, UnicodeError) as error:
            failed.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout)
    if failed:
        temporary = getattr(failed[0], "errno", None) == socket.EAI_AGAIN
        raise FetchError("dns", "temporary failure" if temporary else "no such host")
    if thread.is_alive():
        raise FetchError("timeout", "looking up the host")
    return found
