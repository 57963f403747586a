"""Texts that a text tower is taught readouts of: captions, mixtures of their words, and phrases with a lexicon's words.

Every draw is a function of the generator it is given. It knows nothing of pictures or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer.sources import wrong_captions

if TYPE_CHECKING:
    import numpy as np

    from trainer.lexicon import Lexicon
    from trainer.sources import Source

TEXTS = 384  # of a step
KEPT_SHARE, PHRASE_SHARE = 1 / 8, 3 / 4  # of them to keep; of the others, with a lexicon, its phrases
CAPTIONS, WORDS, KEPT = 3, 12, 0.7  # of a mixture: captions and words at most, share of their words
LENGTHS = (0.3, 0.3, 0.25, 0.15)  # how many phrases have one word, two, three and four
FROM_LEXICON = 0.65  # of the words of longer phrases; the others are the captions'
ARTICLES, WITH_ARTICLE = ("a", "the", "an"), 0.3
JOINTS = (
    *[" "] * 6, ", ", ", ", " and ", " with ", " of ", " in ", " on ",
    " of a ", " with the ", " on a ", " in the ", " and a ",
)  # fmt: skip


class Texts(NamedTuple):
    """One step's texts: of captions, of the lexicon, and those that are to go on as they are."""

    added: list[str]
    phrases: list[str]
    same: list[str]


class Phrases:
    """Phrases of one to four words, a lexicon's and, where there are more than one, those that captions have."""

    def __init__(self, lexicon: Lexicon, captions: Sequence[str]) -> None:
        self._lexicon = lexicon
        self._spoken = " ".join(captions).replace(",", " ").split()

    def __call__(self, rng: np.random.Generator) -> str:
        count = 1 + int(rng.choice(len(LENGTHS), p=LENGTHS))
        text = self._lexicon.a_word(rng)
        for _ in range(count - 1):
            text = f"{text}{JOINTS[rng.integers(len(JOINTS))]}{self._word(rng)}"
        return f"{ARTICLES[rng.integers(len(ARTICLES))]} {text}" if rng.random() < WITH_ARTICLE else text

    def _word(self, rng: np.random.Generator) -> str:
        if rng.random() < FROM_LEXICON:
            return self._lexicon.a_word(rng)
        return self._spoken[rng.integers(len(self._spoken))]


def mixture(captions: Sequence[str], rng: np.random.Generator) -> str:
    """Some words of one to three captions, every second time in another order."""
    chosen = rng.integers(len(captions), size=rng.integers(1, CAPTIONS + 1))
    words = " ".join(captions[row] for row in chosen).replace(",", " ").split()
    kept = [word for word in words if rng.random() < KEPT][:WORDS] or words[:1]
    return " ".join(rng.permutation(kept) if rng.random() < 0.5 else kept)


def draw_texts(
    added: Sequence[str], kept: Sequence[Source], phrases: Phrases | None, rng: np.random.Generator
) -> Texts:
    """An eighth to keep, where there are sets to keep, half of them captions and half wrong ones; of the others, with a
    lexicon, three quarters its phrases; the rest mixtures and captions of what is added, two to one."""
    rest = round(TEXTS * KEPT_SHARE) if kept else 0
    told = [] if phrases is None else [phrases(rng) for _ in range(round((TEXTS - rest) * PHRASE_SHARE))]
    count = TEXTS - rest - len(told)
    mixtures = [mixture(added, rng) for _ in range(2 * count // 3)]
    captions = [added[row] for row in rng.integers(len(added), size=count - len(mixtures))]
    same: list[str] = []
    for number in range(rest // 2):
        train = kept[number % len(kept)].train
        row = int(rng.integers(len(train)))
        caption = train.captions[row]
        wrong = wrong_captions(train, row, caption)
        same += [caption, wrong[int(rng.integers(len(wrong)))] if wrong else caption]
    return Texts([*mixtures, *captions], told, same)
