"""What the mini-web answers at a planned URL: a status, headers, a body, and how the body travels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.miniweb.content import Object, Scene
from pipeline.miniweb.pictures import TYPES, Picture, claimed_bomb, encode, real_bomb

DELIVERIES = (
    "whole",
    "chunked",
    "gzip",
    "gzip_bomb",
    "cut",  # fewer bytes than Content-Length says
    "cut_chunked",  # chunks without the last one
    "drip",  # a byte now and then, for ever
    "slow_headers",  # header lines for ever
    "endless",  # chunks for ever
    "huge_length",  # Content-Length of 100 GB
    "reset",  # the connection is reset instead of an answer
)


@dataclass(frozen=True)
class Reply:
    """An answer. `body` names an entry of `BODIES`; without it and without a `picture` the body is empty.

    The first `len(refusals)` requests for the URL get those statuses instead; `retry_after` says in which form
    they carry `Retry-After`: "seconds", "date" or not at all ("").
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    picture: Picture | None = None
    body: str = ""
    delivery: str = "whole"
    refusals: tuple[int, ...] = ()
    retry_after: str = ""


_PAGE = "<!doctype html><html><head><title>{0}</title></head><body><h1>{0}</h1><p>{1}</p></body></html>"

_SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><circle r="40" fill="red"/></svg>'

BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "page": ("text/html", lambda: _PAGE.format("A page", "No picture here.").encode()),
    "missing": ("text/html", lambda: _PAGE.format("Not found", "We could not find that picture.").encode()),
    "page_as_jpeg": ("image/jpeg", lambda: _PAGE.format("Log in", "Please log in first.").encode()),
    "nothing": ("image/jpeg", bytes),
    "svg": ("image/svg+xml", _SVG.encode),
    "claimed_bomb": ("image/png", claimed_bomb),
    "real_bomb": ("image/png", real_bomb),
}


def content(reply: Reply) -> tuple[str, bytes]:
    """Content type and body."""
    if reply.body:
        kind, make = BODIES[reply.body]
        return kind, make()
    if reply.picture is not None:
        return TYPES[reply.picture.form], encode(reply.picture)
    return "text/plain", b""


def address(url: str) -> tuple[str, str]:
    """Host and decoded target under which a planned URL is found, however a client spells it."""
    parts = urlsplit(url.strip())
    host = (parts.hostname or "").encode("idna").decode().lower()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, unquote(target)


def restored(values: Mapping[str, Any]) -> Reply:
    """A `Reply` from what `dataclasses.asdict` and JSON made of it."""
    picture = values["picture"]
    if picture is not None:
        things = tuple(Object(**thing) for thing in picture["scene"]["objects"])
        scene = Scene(**{**picture["scene"], "objects": things})
        picture = Picture(**{**picture, "scene": scene, "amounts": tuple(picture["amounts"])})
    headers = tuple((str(name), str(value)) for name, value in values["headers"])
    return Reply(**{**values, "picture": picture, "headers": headers, "refusals": tuple(values["refusals"])})
