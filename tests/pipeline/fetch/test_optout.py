"""Every spelling of an opt-out is heard, and nothing else is taken for one."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Callable

import pytest

from pipeline.fetch.client import Client
from pipeline.fetch.optout import OPT_OUTS, content_usage, opt_out, recorded, robots_tag, tdm_reservation

from .conftest import Web, ok, redirect

HARMLESS = [
    "all",
    "nofollow",
    "noarchive",
    "nosnippet",
    "notranslate",
    "indexifembedded",
    "max-snippet:20",
    "max-snippet: -1",
    "max-image-preview:none",
    "max-image-preview: large",
    "max-video-preview:0",
    "data-nosnippet",
    "noairport",
    "nonempty",
    "unavailable_after: 25 Jun 2099 15:00:00 PST",
    "unavailable_after: Wed, 03 Dec 2099 13:09:53 GMT",
    "unavailable_after: Wednesday, 25-Jun-99 15:00:00 PST",
    "unavailable_after: 2099-12-03T13:09:53Z",
    "",
]


def spellings() -> list[str]:
    """Several hundred header values that opt out."""
    rng = random.Random(3)
    values = [f"{prefix}{word}" for word in OPT_OUTS for prefix in ("", "headrace: ", "Headrace:", "*: ", "robots: ")]
    for word, other in itertools.product(sorted(OPT_OUTS), HARMLESS):
        comma = rng.choice([", ", ",", " , ", "; "])
        parts = [word, other] if rng.random() < 0.5 else [other, word]
        values.append(rng.choice(["", "", "headrace: ", "*:"]) + comma.join(parts))
    cases: list[Callable[[str], str]] = [str.upper, str.title, str.lower, lambda v: v.replace("noai", "no-ai")]
    return values + [rng.choice(cases)(value) for value in values]


def test_there_are_hundreds() -> None:
    assert len(spellings()) > 250


@pytest.mark.parametrize("value", spellings())
def test_opt_outs_are_heard(value: str) -> None:
    assert robots_tag(value) is not None


@pytest.mark.parametrize(
    "value",
    [
        *HARMLESS,
        ", ".join(HARMLESS),
        "googlebot: noindex",
        "googlebot: nofollow, noai",
        "GPTBot: none",
        "otherbot: noindex, headrace: nofollow",
        "headrace: all, googlebot: noai",
        "headracer: noai",
        "xheadrace: noai",
        "googlebot:noindex;noai",
    ],
)
def test_others_are_not(value: str) -> None:
    assert robots_tag(value) is None


def test_groups_within_one_header() -> None:
    assert robots_tag("googlebot: nofollow, headrace: noai") == "X-Robots-Tag: noai"
    assert robots_tag("googlebot: unavailable_after: Wed, 03 Dec 2099 13:09:53 GMT, noai") is None
    assert robots_tag("noai, googlebot: all") == "X-Robots-Tag: noai"
    assert robots_tag("noai: 1") == "X-Robots-Tag: noai"


def test_tdm_and_usage() -> None:
    assert [tdm_reservation(v) for v in ("1", " 1 ", "0", "", "10", "0, 1")] == [
        "tdm-reservation: 1",
        "tdm-reservation: 1",
        None,
        None,
        None,
        "tdm-reservation: 1",
    ]
    for value in (
        "train-ai=n",
        "Train-AI=N",
        "search=y, train-ai=n",
        "train-ai=n;x=1",
        "train-ai=y, train-ai=n",
        "bots=n",
    ):
        assert content_usage(value) is not None
    for value in ("train-ai=y", "search=n", "", "train-ai", "train-ai=n, train-ai=y", "=n", "retrain-ai=n"):
        assert content_usage(value) is None


def test_several_headers_and_the_record() -> None:
    assert opt_out(["nofollow", "googlebot: noai", "NoImageAI"], [], []) == "X-Robots-Tag: noimageai"
    assert opt_out([], ["1"], []) == "tdm-reservation: 1"
    assert opt_out([], [], ["train-ai=n"]) == "Content-Usage: train-ai=n"
    assert opt_out(["all"], ["0"], ["train-ai=y"]) is None
    assert recorded(["all", "noai"], ["0"], []) == "X-Robots-Tag: all; X-Robots-Tag: noai; tdm-reservation: 0"
    assert recorded([], [], []) is None
    assert len(recorded(["x" * 5000], [], []) or "") == 1000


def test_headers_are_heard_before_the_body(client: Callable[..., Client], web: Web) -> None:
    """The body never comes, so that a client that waits for it would time out; and at every hop."""
    sent = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nx-robots-TAG: all\r\nX-ROBOTS-tag: noai\r\n\r\n"

    def hang(link: socket.socket, _: object) -> None:
        link.sendall(sent)
        link.recv(1)

    web.pages["/x"] = hang
    fetched = client(opt_out=True).fetch("http://a.web.test/x")
    assert (fetched.error, fetched.permanent) == ("opt_out: X-Robots-Tag: noai", True)
    assert fetched.opt_out == "X-Robots-Tag: all; X-Robots-Tag: noai"
    web.pages["/hop"] = redirect("/y").replace(b"Content-Length", b"tdm-reservation: 1\r\nContent-Length")
    web.pages["/y"] = ok()
    assert client(opt_out=True).fetch("http://a.web.test/hop").error == "opt_out: tdm-reservation: 1"
    assert web.asked("/y") == []


def test_recorded_even_where_not_honoured(client: Callable[..., Client], web: Web) -> None:
    web.pages["/x"] = ok(b"picture", "X-Robots-Tag: noai")
    fetched = client(opt_out=False).fetch("http://a.web.test/x")
    assert (fetched.body, fetched.opt_out) == (b"picture", "X-Robots-Tag: noai")


def test_a_torn_header_hides_nothing(client: Callable[..., Client], web: Web) -> None:
    web.pages["/x"] = ok(b"picture", "junk without a colon", "X-Robots-Tag: noai")
    fetched = client(opt_out=True).fetch("http://a.web.test/x")
    assert fetched.body is None and fetched.error == "protocol: malformed header line"
