"""Hostile text made fit for tables: cells that no spreadsheet runs, and the hosts of URLs that come from anywhere."""

from __future__ import annotations

_FORMULA = tuple("=+-@\t\r＝＋－＠")


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
