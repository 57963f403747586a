"""WordNet's nouns as a lexicon: from files of its form."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.kinds import Nouns, regular_plural, write_kinds
from trainer.lexicon import read_lexicon

LICENCE = "  1 This is a licence.  \n"
# offset, lexicographer's file, part of speech, number of words (hexadecimal), words, pointers, explanation
SYNSETS = [
    ("00001740", ["entity"], []),
    ("00001930", ["physical_entity"], [("@", "00001740")]),
    ("00002137", ["abstraction"], [("@", "00001740")]),
    ("00003001", ["animal", "beast"], [("@", "00001930"), ("~", "00003002")]),
    ("00003002", ["hedgehog"], [("@", "00003001")]),
    ("00003003", ["mouse"], [("@", "00003001")]),
    ("00003004", ["mouse"], [("@", "00001930")]),
    ("00003005", ["polar_bear"], [("@", "00003001")]),
    ("00003006", ["laika"], [("@i", "00003001")]),
    ("00003007", ["are"], [("@", "00001930")]),
    ("00003008", ["chronology"], [("@", "00002137")]),
]
INDEX = {"mouse": ["00003003", "00003004"]} | {
    word: [place] for place, words, _ in SYNSETS for word in words if word != "mouse"
}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    data = [LICENCE]
    for place, words, pointers in SYNSETS:
        named = " ".join(f"{word} 0" for word in words)
        pointed = "".join(f" {sign} {goal} n 0000" for sign, goal in pointers)
        data.append(f"{place} 03 n {len(words):02x} {named} {len(pointers):03d}{pointed} | what | it is  \n")
    (folder / "data.noun").write_text("".join(data))
    lines = [f"{w} n {len(p)} 1 @ {len(p)} 0 {' '.join(p)}  \n" for w, p in sorted(INDEX.items())]
    (folder / "index.noun").write_text("".join([LICENCE, *lines]))
    (folder / "noun.exc").write_text("mice mouse\noxen ox\n")
    return folder


def test_kinds_go_up_to_the_top_and_later_meanings_count_less(wordnet: Path) -> None:
    nouns = Nouns(wordnet)
    above = {"00003001", "00001930", "00001740"}
    assert nouns.kinds("hedgehog") == dict.fromkeys({"00003002"} | above, 1.0)
    assert nouns.kinds("mouse") == dict.fromkeys({"00003003"} | above, 1.0) | {"00003004": 0.4}


def test_plurals_are_entries_and_names_are_none(wordnet: Path) -> None:
    found = dict(Nouns(wordnet).entries())
    assert found["mice"] == found["mouse"] and "mouses" not in found
    assert found["hedgehogs"] == found["hedgehog"] and "polar bear" in found
    assert "laika" not in found


def test_the_table_has_what_the_vocabulary_has_and_common_words_first(wordnet: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "kinds.parquet"
    count = write_kinds(path, wordnet)
    words = pq.read_table(path)["word"].to_pylist()
    assert count == len(words) == len(set(words)) and read_lexicon(path).words == words
    assert {"animal", "animals", "hedgehog", "mouse", "mice", "polar bear"} <= set(words)
    assert not {"are", "chronology", "laika"} & set(words)  # one token of no thing, two of an idea, a name
    assert words.index("animal") < words.index("hedgehog") < words.index("polar bear")


def test_no_wordnet_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no WordNet in"):
        write_kinds(tmp_path / "kinds.parquet", tmp_path)


@pytest.mark.parametrize(
    ("word", "plural"), [("cat", "cats"), ("fox", "foxes"), ("pony", "ponies"), ("day", "days"), ("church", "churches")]
)
def test_plurals(word: str, plural: str) -> None:
    assert regular_plural(word) == plural
