"""How each fault is planted: one function per fault that makes its `k`-th row.

Which faults there are and what becomes of their rows says `faults`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from pipeline.miniweb import hosts, odd_urls, words
from pipeline.miniweb.content import Scene, generator
from pipeline.miniweb.replies import Reply
from pipeline.miniweb.rows import Maker, PlannedUrl
from pipeline.miniweb.scenes import caption, swaps, wrong_caption

T = TypeVar("T")
Planter = Callable[[Maker, int], PlannedUrl]


def _pick(values: tuple[T, ...], k: int) -> T:
    return values[k % len(values)]


def _with(reply: Reply, **keywords: Any) -> Planter:
    """Clean but for how it is answered, or where it lies."""
    return lambda maker, k: maker.row(reply, **keywords)


def _form(form: str, **keywords: Any) -> Planter:
    return lambda maker, k: maker.row(form=form, **keywords)


def _captioned(text: Callable[[int], str | None]) -> Planter:
    return lambda maker, k: maker.row(text=text(k))


def _elsewhere(host: str, *folders: str) -> Planter:
    return lambda maker, k: maker.row(host=host, folder=_pick(folders or ("pictures",), k))


def _headers(*choices: tuple[tuple[str, str], ...]) -> Planter:
    return lambda maker, k: maker.row(Reply(headers=_pick(choices, k)))


def _robots_tags(*values: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple((("X-Robots-Tag", value),) for value in values)


_AGAINST = (
    *_robots_tags("noai", "noimageai", "noml", "none", "noindex", "noimageindex", "NoAI", "noai, noimageai"),
    *_robots_tags("max-snippet:20, noai", "noai, max-snippet:20", "headrace: noai", "*: noai"),
    (("X-Robots-Tag", "nosnippet"), ("X-Robots-Tag", "NOIMAGEAI")),
    (("x-robots-tag", "googlebot: nofollow"), ("X-ROBOTS-TAG", "noai")),
)
_NOT_AGAINST = (
    *_robots_tags("googlebot: noai", "otherbot: noindex, nofollow", "all", "index, follow", "nosnippet"),
    *_robots_tags("max-image-preview:none", "unavailable_after: 25 Jun 2035 15:00:00 PST", "noarchive"),
    (("tdm-reservation", "0"),),
    (("Content-Usage", "train-ai=y"),),
)


def _redirected(maker: Maker, k: int) -> PlannedUrl:
    """One to three hops, the first relative, the second to another host."""
    row = maker.row()
    answer = row.routes[0][1]
    host = str(row.url).split("/")[2]
    stops = [str(row.url)] + [f"http://{host}/moved/{hop}/{k}.jpg" for hop in range(k % 3)]
    if k % 3 == 2:
        stops[2] = f"http://{_pick(hosts.ORDINARY, k + 7)}/moved/{k}.jpg"
    end = maker.other(row, host=host if k % 3 == 0 else None)
    stops.append(str(end.url))
    routes = []
    for hop, (here, there) in enumerate(pairwise(stops)):
        same_host = there.split("/")[2] == here.split("/")[2]
        location = "/" + there.split("/", 3)[3] if same_host else there
        routes.append((here, _to(location, _pick((301, 302, 303, 307, 308), k + hop))))
    return replace(row, routes=(*routes, (stops[-1], answer)))


def _to(location: str, status: int = 302) -> Reply:
    return Reply(status=status, headers=(("Location", location),), body="page")


def _chain(steps: int, closed: bool) -> Planter:
    """Redirects that end where they began, or at a picture after too many."""

    def plant(maker: Maker, k: int) -> PlannedUrl:
        row = maker.row()
        stops = [str(row.url), *(f"{row.url}?hop={hop}" for hop in range(1, steps))]
        routes = [(here, _to(there)) for here, there in pairwise(stops)]
        last = _to(stops[0]) if closed else row.routes[0][1]
        return replace(row, routes=(*routes, (stops[-1], last)))

    return plant


def _redirect_to(*locations: str) -> Planter:
    return lambda maker, k: maker.row(_to(_pick(locations, k)))


def _refusing(status: int, *ways: tuple[int, str], host: str | None = None) -> Planter:
    """So many refusals, with `Retry-After` in that form, then the picture."""

    def plant(maker: Maker, k: int) -> PlannedUrl:
        times, form = _pick(ways, k)
        return maker.row(Reply(refusals=(status,) * times, retry_after=form), host=host)

    return plant


def _always(status: int, retry_after: str = "", host: str | None = None) -> Planter:
    refusals = (("Retry-After", "1"),) if retry_after else ()
    return lambda maker, k: maker.row(Reply(status=status, headers=refusals, body="missing"), host=host)


def _sent_as(*kinds: str) -> Planter:
    return lambda maker, k: maker.row(Reply(headers=(("Content-Type", _pick(kinds, k)),)))


def _without_colour(shown: Scene) -> bool:
    return shown.background == "grey" and all(thing.colour in ("black", "white") for thing in shown.objects)


def _grey(form: str) -> Planter:
    return lambda maker, k: maker.row(shown=maker.scene(None, _without_colour), form=form)


def _mislabelled(maker: Maker, k: int) -> PlannedUrl:
    return maker.row(extension=_pick(("", "php", "png"), k))


def _odd(maker: Maker, k: int) -> PlannedUrl:
    row = maker.row()
    written, requested = odd_urls.working(k, maker.seed)
    return replace(row, url=written, routes=((requested, row.routes[0][1]),))


def _no_route(written: Callable[[int], str | None]) -> Planter:
    """A URL that is never asked for."""
    return lambda maker, k: replace(maker.row(), url=written(k), routes=())


def _html(maker: Maker, k: int) -> PlannedUrl:
    return maker.row(Reply(body=_pick(("page", "page_as_jpeg"), k)))


def _wrong(maker: Maker, k: int) -> PlannedUrl:
    shown = maker.scene(held=True)
    return maker.row(shown=shown, text=wrong_caption(shown, maker.seed + 1, k, maker.seed * 7919 + k))


def _spam(k: int) -> str:
    return _pick(words.SPAM, k).format(n=20 + k)


def _file_name(k: int) -> str:
    return _pick(words.FILENAMES, k).format(n=17 + 41 * k)


def _foreign(k: int) -> str:
    sentences = tuple(words.FOREIGN.values())
    return _pick(_pick(sentences, k), k // len(sentences))


def _long(k: int) -> str:
    return words.prose(190_000) if k == 0 else words.prose(500 + 100 * k)


_JPEG_DAMAGE = ("scribble", "scribble", "no_tables")
_PRIVATE = (
    "http://127.0.0.1:22/a.jpg",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.5/a.jpg",
    "http://[::1]/a.jpg",
    "http://192.168.1.1/a.jpg",
    "http://2130706433/a.jpg",
    "//0x7f.1/a.jpg",
    "http://[::ffff:127.0.0.1]/a.jpg",
)

PLANTERS: dict[str, Planter] = {
    "http_404": _always(404),
    "http_410": _always(410),
    "http_403": _always(403),
    "http_500": _always(500),
    "always_429": _always(429, "1", hosts.OVERLOADED),
    "always_503": _always(503, "1", hosts.OVERLOADED),
    "unknown_host": lambda maker, k: replace(maker.row(host=_pick(hosts.UNKNOWN, k)), routes=()),
    "refused": _with(Reply(), host=hosts.CLOSED),
    "reset": _with(Reply(delivery="reset"), host=hosts.RESETTING),
    "drip": _with(Reply(delivery="drip")),
    "slow_headers": _with(Reply(delivery="slow_headers")),
    "endless": _with(Reply(delivery="endless")),
    "huge_length": _with(Reply(delivery="huge_length")),
    "gzip_bomb": _with(Reply(delivery="gzip_bomb")),
    "cut": _with(Reply(delivery="cut")),
    "cut_chunked": _with(Reply(delivery="cut_chunked")),
    "empty_body": _with(Reply(body="nothing")),
    "redirect": _redirected,
    "redirect_loop": _chain(2, closed=True),
    "redirect_chain": _chain(26, closed=False),
    "redirect_file": _redirect_to("file:///etc/passwd", "ftp://files.miniweb.test/a.jpg", "data:image/png;base64,AA=="),
    "redirect_private": _redirect_to(*_PRIVATE),
    "chunked": _with(Reply(delivery="chunked")),
    "gzip_picture": _with(Reply(delivery="gzip")),
    "then_good_429": _refusing(429, (1, "seconds"), (2, "seconds"), (1, "date"), host=hosts.BUSY),
    "then_good_503": _refusing(503, (1, "seconds"), host=hosts.BUSY),
    "then_good_500": _refusing(500, (1, "")),
    "limited_host": _elsewhere(hosts.LIMITED),
    "slow_host": _elsewhere(hosts.SLOW),
    "wrong_type": _sent_as("text/html", "text/plain", "application/octet-stream"),
    "wrong_extension": _mislabelled,
    "odd_url": _odd,
    "robots_all": _elsewhere(hosts.FORBIDDEN),
    "robots_agent": _elsewhere(hosts.UNWELCOMING),
    "robots_path": lambda maker, k: (
        maker.row(host=hosts.WALLED, folder="free", form="webp")
        if k % 2
        else maker.row(host=hosts.WALLED, folder="pictures")
    ),
    "robots_5xx": _elsewhere(hosts.BROKEN_RULES),
    "robots_allowed": _elsewhere(hosts.WALLED, "pictures/open", "free"),
    "robots_missing": _elsewhere(hosts.BARE),
    "robots_others": _elsewhere(hosts.OTHERS_ONLY),
    "opt_out_header": _headers(*_AGAINST),
    "opt_out_usage": _headers((("Content-Usage", "train-ai=n"),)),
    "opt_out_tdm": _headers((("tdm-reservation", "1"),), (("TDM-Reservation", "1"), ("tdm-policy", "/p.json"))),
    "opt_out_tdm_file": _elsewhere(hosts.RESERVED, "art", "art/prints"),
    "not_opt_out": _headers(*_NOT_AGAINST),
    "open_tdm_file": _elsewhere(hosts.RESERVED, "press", "photos"),
    "html": _html,
    "soft_404": _with(Reply(body="missing")),
    "svg": _with(Reply(body="svg"), extension="svg"),
    "cut_jpeg": _form("jpeg", damage="cut"),
    "cut_png": _form("png", damage="cut"),
    "corrupt_jpeg": lambda maker, k: maker.row(damage=_pick(_JPEG_DAMAGE, k)),
    "corrupt_png": _form("png", damage="scribble"),
    "claimed_bomb": _with(Reply(body="claimed_bomb"), extension="png"),
    "real_bomb": _with(Reply(body="real_bomb"), extension="png"),
    "progressive": _form("jpeg_progressive"),
    "cmyk": _form("jpeg_cmyk"),
    "grey_jpeg": _grey("jpeg_grey"),
    "png": _form("png"),
    "png_16bit": _form("png_16bit"),
    "grey_16bit": _grey("png_grey16"),
    "palette": _form("png_palette"),
    "transparent": _form("png_transparent"),
    "animated_png": _form("png_animated"),
    "gif": _form("gif"),
    "animated_gif": _form("gif_animated"),
    "webp": _form("webp"),
    "animated_webp": _form("webp_animated"),
    "bmp": _form("bmp"),
    "tiff": _form("tiff"),
    "exif_rotated": lambda maker, k: maker.row(orientation=2 + k % 7),
    "large_picture": _with(Reply(), side=1600),
    "tiny": lambda maker, k: maker.row(side=_pick((8, 16, 24), k), form=_pick(("jpeg", "png", "gif"), k)),
    "tracking_pixel": lambda maker, k: maker.row(side=1, form="gif", edit="blank", amounts=(254.0,)),
    "banner": lambda maker, k: maker.row(edit="stretch", amounts=_pick(((900.0, 150.0), (150.0, 900.0)), k)),
    "sliver": lambda maker, k: maker.row(edit="stretch", amounts=_pick(((2000.0, 8.0), (8.0, 2000.0)), k)),
    "near_blank": lambda maker, k: maker.row(edit="blank", amounts=(float(23 * k % 250),)),
    "wrong_caption": _wrong,
    "spam_caption": _captioned(_spam),
    "filename_caption": _captioned(_file_name),
    "foreign_caption": _captioned(_foreign),
    "null_caption": _captioned(lambda k: None),
    "empty_caption": lambda maker, k: replace(maker.row(text=None), caption="   " if k % 2 else ""),
    "one_word": _captioned(lambda k: _pick(words.WORDS, k)),
    "repeated_caption": _captioned(lambda k: words.TEMPLATES[k // 30 % len(words.TEMPLATES)]),
    "long_caption": _captioned(_long),
    "no_url": _no_route(lambda k: "" if k % 2 else None),
    "invalid_url": _no_route(lambda k: _pick(odd_urls.INVALID, k)),
    "scheme": _no_route(lambda k: _pick(odd_urls.OTHER_SCHEMES, k)),
    "private_address": _no_route(lambda k: _pick(odd_urls.PRIVATE, k)),
}

# --------------------------------------------------------------------------------------- near-duplicates

COPIES = ("dup_exact", "dup_same_url", "dup_reencoded", "dup_resized", "dup_cropped", "dup_recoloured")


def copy(maker: Maker, name: str, original: PlannedUrl) -> PlannedUrl:
    """A near-copy of a group's original under another caption, and but for `dup_same_url` under another URL."""
    number, shown = maker.copies, original.shown
    variant = maker.seed * 1_000_003 + 500_000 + number
    told = replace(original, caption=caption(shown, variant), swaps=tuple(swaps(shown, variant)), routes=())
    if name == "dup_same_url":
        return told
    reply = original.routes[0][1]
    assert reply.picture is not None, "an original answers with a picture"
    changed = replace(reply.picture, **_edited(name, number, generator("copy", maker.seed, number).random(8).tolist()))
    extension = "webp" if changed.form == "webp" else "jpg"
    row = maker.other(told, extension=extension)
    return replace(row, routes=((str(row.url), replace(reply, picture=changed)),))


def _edited(name: str, number: int, at: list[float]) -> dict[str, Any]:
    """Fields of `Picture` that make the copy; `at` are numbers in 0..1."""
    if name == "dup_exact":
        return {}
    if name == "dup_reencoded":
        return {"form": "webp" if number % 4 == 0 else "jpeg", "quality": int(30 + 61 * at[0])}
    if name == "dup_resized":
        return {"edit": "resize", "amounts": (0.6 + 0.3 * at[0] if at[1] < 0.5 else 1.1 + 0.4 * at[0],)}
    if name == "dup_cropped":
        return {"edit": "crop", "amounts": (at[0], at[1], 0.02 + 0.04 * at[2])}
    if number % 3 == 0:
        return {"edit": "brightness", "amounts": (0.85 + 0.27 * at[0],)}
    if number % 3 == 1:
        return {"edit": "saturation", "amounts": (0.7 + 0.6 * at[0],)}
    return {"edit": "tint", "amounts": (*(60 + 160 * value for value in at[:3]), 0.04 + 0.05 * at[3])}
