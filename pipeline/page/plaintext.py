"""Hostile text made fit to look at: captions, URLs and names that come from anywhere.

It knows neither HTML nor terminals: who writes a page still escapes, who writes a line still counts its width.
"""

from __future__ import annotations

import unicodedata

_FORMULA = tuple("=+-@\t\r＝＋－＠")
_SPELLED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_JOINERS = "\u200c\u200d"  # harmless, and part of emoji and of some scripts


def visible(text: str, limit: int) -> str:
    """Text on one line, at most `limit` characters, with control and direction characters spelled out."""
    shown = spelled_out(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def spelled_out(text: str) -> str:
    """Text with every control and direction character, line ends too, written as its escape."""
    return "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    if character in _JOINERS or (unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"):
        return character
    return _SPELLED.get(character, f"\\u{ord(character):04x}")


def harmless_cell(text: str) -> str:
    """Text that no spreadsheet runs: an apostrophe goes before what would begin a formula (OWASP, CSV injection)."""
    return f"'{text}" if text.startswith(_FORMULA) or text.lstrip().startswith(_FORMULA) else text


def host(url: str) -> str:
    """The host of a URL, or its folder where it is a path; empty where there is neither."""
    _, separator, rest = url.partition("://")
    if not separator:
        return url.rpartition("/")[0]
    authority = rest.replace("?", "/").replace("#", "/").replace("\\", "/").split("/", 1)[0]
    return authority.rpartition("@")[2].lower()
