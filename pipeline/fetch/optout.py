"""What a response's headers say against use for training: pure functions from header values to a reason or None.

Three signals are read: `X-Robots-Tag` (noai, noimageai, noml; and noindex, noimageindex, none, because a picture whose
owner keeps it out of image search has not been offered to a public data set, and `none` means `noindex, nofollow`),
TDMRep's `tdm-reservation: 1`, and `Content-Usage` (draft-ietf-aipref-attach). Not read: `unavailable_after`, and
anything inside a body.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.fetch import AGENT

OPT_OUTS = frozenset({"noai", "noimageai", "noml", "noimageindex", "noindex", "none"})
USAGES = frozenset({"train-ai", "train-genai", "ai", "genai", "tdm", "bots", "automated", "all"})

# Directives whose value follows a colon; without this list `max-image-preview:none` would read as `none`.
_VALUED = frozenset({"max-snippet", "max-image-preview", "max-video-preview"})
_OUR_NAMES = frozenset({AGENT, "*", "robots", "all"})
_PREFIX = re.compile(r"\s*([a-z*][a-z0-9_.*/-]*)\s*:\s*", re.IGNORECASE)
_WORD = re.compile(r"[^\s\"'=:]+")


def opt_out(robots: Sequence[str], reservations: Sequence[str], usages: Sequence[str]) -> str | None:
    """The first opt-out in the values of `X-Robots-Tag`, `tdm-reservation` and `Content-Usage`, else None."""
    for reason in (
        *map(robots_tag, robots),
        *map(tdm_reservation, reservations),
        *map(content_usage, usages),
    ):
        if reason:
            return reason
    return None


def recorded(robots: Sequence[str], reservations: Sequence[str], usages: Sequence[str]) -> str | None:
    """The headers as they came, for the record: None when there are none. At most 1,000 characters."""
    named = (("X-Robots-Tag", robots), ("tdm-reservation", reservations), ("Content-Usage", usages))
    text = "; ".join(f"{name}: {value}" for name, values in named for value in values)
    return text[:1000] or None


def robots_tag(value: str) -> str | None:
    """The opt-out in one `X-Robots-Tag` header, or None.

    Directives may be split by commas, semicolons or spaces, in any case, with or without inner hyphens (`no-ai`). A
    leading `agent:` restricts what follows to that agent, until another `agent:`; only ours, `*` and `robots` count.
    """
    ours = True
    for part in re.split(r"[,;]", value):
        rest = part
        while prefix := _PREFIX.match(rest):
            name = prefix[1].lower()
            after = rest[prefix.end() :]
            if name == "unavailable_after":
                rest = ""
            elif name in _VALUED:
                rest = after.partition(" ")[2]
            elif _plain(name) in OPT_OUTS:
                break
            else:
                ours = name in _OUR_NAMES
                rest = after
        found = next((word for word in map(_plain, _WORD.findall(rest)) if word in OPT_OUTS), None)
        if ours and found:
            return f"X-Robots-Tag: {found}"
    return None


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "").strip(".")


def tdm_reservation(value: str) -> str | None:
    """TDMRep's header: 1 reserves the rights, anything else does not."""
    if any(part.strip() == "1" for part in value.split(",")):
        return "tdm-reservation: 1"
    return None


def content_usage(value: str) -> str | None:
    """AIPREF's dictionary, e.g. `train-ai=n, search=y`; the last value of a label wins (RFC 9651)."""
    preferences: dict[str, str] = {}
    for member in value.lower().split(","):
        label, _, preference = member.partition(";")[0].partition("=")
        preferences[label.strip()] = preference.strip()
    denied = next((label for label, preference in preferences.items() if preference == "n" and label in USAGES), None)
    return f"Content-Usage: {denied}=n" if denied else None
