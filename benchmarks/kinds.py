"""What English nouns are kinds of, by WordNet, as the table that `trainer clip --lexicon` takes:
`python -m benchmarks.kinds OUT.parquet [--wordnet DIR]`.

WordNet 3.0 (Princeton University; Debian's package `wordnet-base`) lists a noun's meanings from common to rare, and
what each is a kind of, up to "entity". A noun's kinds are those of its first three meanings, later ones counting less.
Taken are nouns that CLIP's vocabulary has whole, and things of two of its tokens, or of three where that is one word:
what is rare on the web is rarely in captions, and what is no thing is rarely in pictures. Names of single people and
places are left out, and so are nouns of fewer than three letters, with hyphens, or that look like "are" or "but".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import open_clip
import pyarrow as pa

from pipeline.shards import write_parquet
from trainer.augment import FUNCTION_WORD
from trainer.lexicon import COLUMNS, LONGEST

WORDNET = Path("/usr/share/wordnet")
MEANINGS = (1.0, 0.4, 0.2)  # what a noun's first, second and third meaning count
THING = "00001930"  # the synset of "physical entity", by which things are told from ideas
PLAIN = re.compile(rf"[a-z]{{3,}}( [a-z]+){{0,{LONGEST - 1}}}")
TOKENS = (3, 2, 2)  # of CLIP's vocabulary at most, of an entry of one, two or three words

Kinds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, default=WORDNET)
    options = parser.parse_args()
    print(f"{write_kinds(options.out, options.wordnet)} words")


def write_kinds(out: Path, folder: Path) -> int:
    """Write the table; returns its number of words."""
    rows = common_first(Nouns(folder).entries())
    columns = [[word for word, _ in rows], [list(kinds) for _, kinds in rows], [[*kinds.values()] for _, kinds in rows]]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, COLUMNS.values(), strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(pa.table(arrays, names=list(COLUMNS)), out)
    return len(rows)


class Nouns:
    """WordNet's nouns, of its files' form (wndb(5))."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "data.noun").is_file():
            hint = "hint: `apt-get install wordnet-base`, or give --wordnet DIR"
            sys.exit(f"error: there is no WordNet in {folder}\n{hint}")
        self._meanings: dict[str, list[str]] = {}
        self._above: dict[str, list[str]] = {}
        self._single: set[str] = set()
        for fields in _lines(folder / "index.noun"):
            self._meanings[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
        for fields in _lines(folder / "data.noun"):
            pointers = fields[4 + 2 * int(fields[3], 16) :]
            quadruples = [pointers[place : place + 4] for place in range(1, 4 * int(pointers[0]), 4)]
            self._above[fields[0]] = [goal for sign, goal, *_ in quadruples if sign in ("@", "@i")]
            self._single |= {fields[0] for sign, *_ in quadruples if sign == "@i"}
        self._irregular = [line.split()[:2] for line in (folder / "noun.exc").read_text(encoding="utf-8").splitlines()]
        self.kinds_of_meaning = cache(self._kinds_of_meaning)

    def entries(self) -> Iterator[tuple[str, Kinds]]:
        """Singulars and plurals with their kinds, but for names."""
        plurals = {singular: plural for plural, singular in self._irregular}
        for word, meanings in self._meanings.items():
            if meanings[0] in self._single:
                continue
            kinds = self.kinds(word)
            yield word, kinds
            plural = plurals.get(word, regular_plural(word))
            if plural not in self._meanings and " " not in word:
                yield plural, kinds

    def kinds(self, word: str) -> Kinds:
        """How much a word means each kind."""
        found: Kinds = {}
        for meaning, weight in zip(self._meanings[word], MEANINGS, strict=False):
            for kind in self.kinds_of_meaning(meaning):
                found.setdefault(kind, weight)
        return found

    def _kinds_of_meaning(self, meaning: str) -> frozenset[str]:
        return frozenset({meaning}.union(*map(self.kinds_of_meaning, self._above[meaning])))


def _lines(path: Path) -> Iterator[list[str]]:
    """The fields of a file's lines, but for the licence, which is indented, and the explanations."""
    with path.open(encoding="utf-8") as file:
        yield from (line.split("|")[0].split() for line in file if not line.startswith(" "))


def regular_plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "z", "ch", "sh")) else f"{word}s"


def common_first(entries: Iterator[tuple[str, Mapping[str, float]]]) -> list[tuple[str, Mapping[str, float]]]:
    """The entries to take; those of few tokens first, of these the ones whose tokens are early in the vocabulary."""
    tokenizer = open_clip.SimpleTokenizer()
    ranked = []
    for word, kinds in dict(entries).items():
        if not PLAIN.fullmatch(word) or FUNCTION_WORD.fullmatch(word):
            continue
        tokens = tokenizer.encode(word)
        if len(tokens) == 1 or (len(tokens) <= TOKENS[word.count(" ")] and THING in kinds):
            ranked.append((len(tokens), max(tokens), word, kinds))
    return [(word, kinds) for _, _, word, kinds in sorted(ranked, key=lambda row: row[:3])]


if __name__ == "__main__":
    main()
