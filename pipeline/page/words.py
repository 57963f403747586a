"""The words that a person reads for reasons, faults, signals and shares."""

from __future__ import annotations

LOST = {
    "urls": "not worth a fetch",
    "fetch": "could not be fetched",
    "image": "no usable picture",
    "filter": "dropped by a rule",
    "dedup": "duplicates",
}
STEPS = {"urls": "List", "fetch": "Fetch", "image": "Picture", "filter": "Filter", "dedup": "Duplicates"}
REASONS = {
    "urls:repeated": "the same row came before",
    "urls:no_url": "no URL",
    "urls:invalid_url": "not a valid URL",
    "urls:scheme": "neither http nor https",
    "fetch:not_yet": "not fetched yet",
    "fetch:dns": "host name not found",
    "fetch:robots": "robots.txt says no",
    "fetch:opt_out": "opted out of AI training",
    "fetch:blocked_address": "private address",
    "image:undecodable": "cannot be decoded",
    "image:not_an_image": "not a picture",
    "filter:min_side": "too small",
    "filter:max_aspect": "too long or too tall",
    "filter:near_blank": "almost one colour",
    "filter:no_caption": "no caption",
    "filter:min_words": "caption too short",
    "filter:max_words": "caption too long",
    "filter:filename_caption": "caption is a file name",
    "filter:spam_caption": "caption is spam",
    "filter:min_p_en": "caption not English",
    "filter:max_caption_repeats": "caption shared by too many",
    "filter:max_nsfw": "not safe",
    "filter:min_clip": "caption does not fit",
    "filter:top_fraction": "not among the best",
    "filter:block": "shows a blocked concept",
    "filter:where": "fails the recipe's condition",
    "dedup:exact": "the same file",
    "dedup:near": "a near-copy",
    "dedup:against": "near the held-out set",
}


FIGURES = {
    "short_side": "shorter side, pixels",
    "aspect": "longer over shorter side",
    "clip_sim": "CLIP similarity",
    "nsfw": "probability of not safe",
    "p_en": "probability of English",
    "words": "words in the caption",
    "chars": "characters in the caption",
    "lang": "language of the caption",
}


def figure_words(name: str) -> str:
    """A signal's column in words."""
    return FIGURES.get(name) or name.replace("_", " ")


def fault_words(fault: str) -> str:
    """A planted fault in words."""
    return "no fault" if fault == "none" else fault.replace("_", " ")


def reason_words(reason: str) -> str:
    """A reason token in words."""
    code = reason.partition(":")[2] or reason
    return REASONS.get(reason) or (f"HTTP {code[5:]}" if code.startswith("http_") else code.replace("_", " "))


def share(part: float) -> str:
    """A share for a person: `12.3%`, and `<0.1%` rather than a zero that is none."""
    return "<0.1%" if 0 < part < 0.001 else f"{part:.1%}"
