"""What a host asks of crawlers as a whole: robots.txt (RFC 9309), its `Content-Usage` lines, and TDMRep's file.

Each is fetched once per scheme, host and port, and kept below a folder that all processes share, for a day (a host that
could not be asked: ten minutes). Matching is protego's. How a file is fetched, and how politely, is the caller's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protego import Protego

from pipeline.fetch import AGENT
from pipeline.fetch.guard import FetchError
from pipeline.fetch.optout import USAGES, content_usage

MAX_FILE = 500 * 1024  # bytes that are read of either file (RFC 9309, 2.5)
FRESH, FRESH_FAILURE = 86_400.0, 600.0  # seconds
_REMEMBERED = 2048  # hosts whose parsed rules stay in memory
_MAX_RESERVATIONS = 1000  # rules read of one tdmrep.json
_OWN_ERROR = frozenset({"dns", "connect", "tls", "blocked_address"})  # would be the picture's own fate as well

Get = Callable[[str], bytes]  # URL to body, at most MAX_FILE bytes; raises FetchError


@dataclass(frozen=True)
class _Wishes:
    expires: float
    failure: str | None = None  # "code: detail" if the host could not be asked
    rules: Protego | None = None
    usages: Protego | None = None
    reservations: list[tuple[str, bool, Protego]] = field(default_factory=list)


class HostWishes:
    """Asks each host once; `check(url)` raises FetchError `robots`, `opt_out`, or what kept us from asking."""

    def __init__(self, folder: Path, get: Get, robots: bool, opt_out: bool) -> None:
        self._folder = folder
        self._get = get
        self._robots = robots
        self._opt_out = opt_out
        self._memory: OrderedDict[str, _Wishes] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, url: str) -> None:
        if not (self._robots or self._opt_out):
            return
        wishes = self._wishes(_origin(url))
        if wishes.failure is not None:
            code, _, detail = wishes.failure.partition(": ")
            raise FetchError(code, detail, retry_after=math.inf)  # a retry would read the same answer here
        if wishes.rules is not None and not wishes.rules.can_fetch(url, AGENT):
            raise FetchError("robots", "disallowed")
        if wishes.usages is not None and not wishes.usages.can_fetch(url, AGENT):
            raise FetchError("opt_out", "robots.txt Content-Usage")
        if reserved(wishes.reservations, url):
            raise FetchError("opt_out", "tdmrep.json")

    def _wishes(self, origin: str) -> _Wishes:
        with self._lock:
            known = self._memory.get(origin)
            if known is not None and known.expires > time.time():
                self._memory.move_to_end(origin)
                return known
        wishes = _parse(self._stored(origin))
        with self._lock:
            self._memory[origin] = wishes
            while len(self._memory) > _REMEMBERED:
                self._memory.popitem(last=False)
        return wishes

    def _stored(self, origin: str) -> dict[str, Any]:
        """The shared copy, fetched first if there is no fresh one; the file's lock keeps others waiting."""
        name = hashlib.sha256(origin.encode()).hexdigest()[:32]
        path = self._folder / name[:2] / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+", encoding="utf-8", errors="surrogatepass") as file:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            stored = _load(file.read())
            if not time.time() < stored.get("expires", 0.0) <= time.time() + FRESH:
                stored = self._ask(origin)
                file.seek(0)
                file.truncate()
                json.dump(stored, file)
            return stored

    def _ask(self, origin: str) -> dict[str, Any]:
        stored: dict[str, Any] = {"expires": time.time() + FRESH, "robots": "", "tdmrep": ""}
        if self._robots:
            try:
                stored["robots"] = self._get(f"{origin}/robots.txt").decode("utf-8-sig", "replace")
            except FetchError as error:
                failure = _unreachable(error)
                if failure:
                    return {"expires": time.time() + FRESH_FAILURE, "failure": failure}
        if self._opt_out:
            try:
                body = self._get(f"{origin}/.well-known/tdmrep.json")
                stored["tdmrep"] = body.decode("utf-8-sig", "replace")
            except FetchError:
                pass  # no file, no reservation
        return stored


def _origin(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest, maxsplit=1)[0]}"


def _unreachable(error: FetchError) -> str | None:
    """RFC 9309, 2.3.1: 4xx and too many redirects mean no rules (None); 5xx and network errors mean keep out.

    429 is counted with 5xx: it says nothing about rules, only that we come too often.
    """
    if error.code in _OWN_ERROR:
        return str(error)
    unavailable = error.code.startswith(("http_3", "http_4", "redirect_", "http_2")) or error.code == "empty"
    return None if unavailable and error.code != "http_429" else f"robots: unreachable: {error}"


def _load(text: str) -> dict[str, Any]:
    try:
        stored = json.loads(text)
    except ValueError:  # new, or its writer was killed
        return {}
    return stored if isinstance(stored, dict) else {}


def _parse(stored: dict[str, Any]) -> _Wishes:
    if "failure" in stored:
        return _Wishes(stored["expires"], failure=stored["failure"])
    text = stored["robots"]
    return _Wishes(
        stored["expires"],
        rules=Protego.parse(text) if text else None,
        usages=Protego.parse(usage_rules(text)) if "content-usage" in text.lower() else None,
        reservations=parse_tdmrep(stored["tdmrep"]),
    )


def usage_rules(text: str) -> str:
    """robots.txt with only its `Content-Usage` lines, as Disallow (a label we fall under is `n`) or Allow.

    `Content-Usage: /path train-ai=n` limits a path, without one it is the whole host (draft-ietf-aipref-attach).
    """
    lines = []
    for line in text.splitlines():
        bare = line.partition("#")[0].strip()
        match = re.fullmatch(r"content-usage\s*:\s*(/\S*)?\s*(.*)", bare, re.IGNORECASE)
        if match:
            verb = "Disallow" if content_usage(match[2]) else "Allow"
            mentions_us = any(label in match[2].lower() for label in USAGES)
            lines.append(f"{verb}: {match[1] or '/'}" if mentions_us else "Crawl-delay: 0")
        elif re.match(r"user-?\s?agent", bare, re.IGNORECASE):
            lines.append(bare)
        elif bare:
            lines.append("Crawl-delay: 0")  # any rule ends a run of User-agent lines
    return "\n".join(lines)


def parse_tdmrep(text: str) -> list[tuple[str, bool, Protego]]:
    """`(location, reserved, matcher)` per rule of a tdmrep.json; anything malformed in it is no rule."""
    try:
        rules = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return []
    parsed = []
    for rule in rules[:_MAX_RESERVATIONS] if isinstance(rules, list) else []:
        location = rule.get("location") if isinstance(rule, dict) else None
        if isinstance(location, str) and location and location.isprintable():
            pattern = (location if location[0] in "/*" else f"/{location}").replace("#", "%23")
            matcher = Protego.parse(f"User-agent: *\nDisallow: {pattern}")
            parsed.append((location, str(rule.get("tdm-reservation")) in ("1", "True"), matcher))
    return parsed


def reserved(rules: list[tuple[str, bool, Protego]], url: str) -> bool:
    """Whether the first or the longest location that matches `url` is reserved (readers of TDMRep do either)."""
    hits = [(location, flag) for location, flag, matcher in rules if not matcher.can_fetch(url, AGENT)]
    return bool(hits) and (hits[0][1] or max(hits, key=lambda hit: (len(hit[0]), hit[1]))[1])
