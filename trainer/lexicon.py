"""Words and what each is a kind of, from a table: likenesses of words that few captions can teach.

A captioned set names few things, and of what it never names a text tower knows nothing. A dictionary says that a
hedgehog is a mammal, and mammals the captions may know. The table is Parquet with the columns `word` (lower case, up
to three words of letters and digits), `kinds` (what it is a kind of, itself included: names of any form) and `weights`
(as many positive numbers, how much each is meant); common words come first, and of one that comes twice the last row
counts. This module knows nothing of where the table is from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch

from pipeline.base import MISSING, HeadraceError
from pipeline.shards import parquet_file, read_parquet
from trainer.augment import words_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LONGEST = 3  # words of an entry
COMMON = 100  # first words, which are drawn nearly alike
COLUMNS = {"word": pa.string(), "kinds": pa.list_(pa.string()), "weights": pa.list_(pa.float32())}
HINT = "give a table with the columns word, kinds and weights, or leave --lexicon out"


class Labels(NamedTuple):
    """What some `texts` have, K times something in all: rows (K,), int64 names (K,), and how much, float32 (K,)."""

    rows: Tensor
    names: Tensor
    values: Tensor
    texts: int


class Lexicon:
    """Entries by their word, from common to rare; kinds are numbered in the order in which they come."""

    def __init__(self, entries: Mapping[str, Mapping[str, float]]) -> None:
        numbers: dict[str, int] = {}
        self._entries = {
            word: {numbers.setdefault(kind, len(numbers)): weight for kind, weight in kinds.items()}
            for word, kinds in entries.items()
        }
        self.words = list(entries)

    def labels(self, texts: Sequence[str]) -> Labels:
        """The kinds of every text's words, each as much as the word that means it most."""
        rows: list[int] = []
        names: list[int] = []
        values: list[float] = []
        for row, text in enumerate(texts):
            kinds: dict[int, float] = {}
            for entry in self._found(text):
                for kind, weight in entry.items():
                    kinds[kind] = max(weight, kinds.get(kind, 0))
            rows += [row] * len(kinds)
            names += kinds.keys()
            values += kinds.values()
        place, name = torch.tensor([rows, names], dtype=torch.int64)
        return Labels(place, name, torch.tensor(values, dtype=torch.float32), len(texts))

    def a_word(self, rng: np.random.Generator) -> str:
        """One of the words, common ones more often: the n-th as 1 / (n + COMMON), as Zipf and Mandelbrot have it."""
        count = len(self.words)
        return self.words[min(count - 1, int(COMMON * ((1 + count / COMMON) ** rng.random() - 1)))]

    def _found(self, text: str) -> Iterator[Mapping[int, float]]:
        """The entries of a text, the longest first where several begin at one word."""
        words = words_of(text)
        place = 0
        while place < len(words):
            for size in range(LONGEST, 0, -1):
                entry = self._entries.get(" ".join(words[place : place + size]))
                if entry is not None:
                    yield entry
                    break
            place += size


def read_lexicon(path: Path) -> Lexicon:
    """Read a table.

    Raises:
        HeadraceError: no such file (code 3); no Parquet, other columns, no rows, a row whose word no text can hold,
            whose kinds and weights are not as many, or with a weight that is not positive.
    """
    if not path.is_file():
        raise HeadraceError(f"there is no lexicon {path}", hint="check --lexicon", code=MISSING)
    try:
        absent = [name for name in COLUMNS if name not in parquet_file(path).schema_arrow.names]
        table = None if absent else read_parquet(path, list(COLUMNS))
    except HeadraceError as error:
        raise HeadraceError(str(error), hint=HINT) from None
    if table is None:
        raise HeadraceError(f"{path} has no column {absent[0]}", hint=HINT)
    try:
        rows = table.select(list(COLUMNS)).cast(pa.schema(COLUMNS)).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise HeadraceError(
            f"{path} has other types than words, lists of names and lists of numbers", hint=HINT
        ) from None
    if not rows:
        raise HeadraceError(f"{path} has no words", hint=HINT)
    for number, row in enumerate(rows):
        if (odd := _odd(row)) is not None:
            raise HeadraceError(f"{path} has in row {number} {odd}", hint=HINT)
    return Lexicon({row["word"]: dict(zip(row["kinds"], row["weights"], strict=True)) for row in rows})


def _odd(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row."""
    word, kinds, weights = row["word"] or "", row["kinds"] or [], row["weights"] or []
    words = words_of(word)
    if " ".join(words) != word or not 0 < len(words) <= LONGEST:
        return f"the word {word!r}: a text is searched for one to {LONGEST} lower-case words of letters and digits"
    if not kinds or not all(kinds) or len(kinds) != len(weights):
        return f"no kinds of {word!r} with a weight each"
    if not all(weight is not None and 0 < weight < math.inf for weight in weights):
        return f"a weight of {word!r} that is not positive"
    return None
