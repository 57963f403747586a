"""Words and what each is a kind of: read from a table, found in texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base import HeadraceError
from trainer.lexicon import COMMON, Lexicon, read_lexicon

BEARS = {
    "bear": {"bear": 1.0, "animal": 1.0, "thing": 1.0, "to carry": 0.4},
    "teddy": {"garment": 1.0},
    "teddy bear": {"toy": 1.0, "thing": 1.0},
    "club": {"weapon": 1.0, "thing": 1.0, "card": 0.2},
}
NUMBERS = {kind: n for n, kind in enumerate(dict.fromkeys(kind for kinds in BEARS.values() for kind in kinds))}


def told(text: str) -> dict[int, float]:
    labels = Lexicon(BEARS).labels(["none of them", text])
    assert labels.texts == 2 and not (labels.rows == 0).any()
    pairs = zip(labels.names.tolist(), labels.values.tolist(), strict=True)
    return {name: round(value, 5) for name, value in pairs}


def numbered(kinds: dict[str, float]) -> dict[int, float]:
    return {NUMBERS[kind]: weight for kind, weight in kinds.items()}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("A bear.", BEARS["bear"]),
        ("Teddy bear, bear", BEARS["bear"] | {"toy": 1.0}),  # the longest entry that begins at a word
        ("bear teddy", BEARS["bear"] | {"garment": 1.0}),
        ("the teddy's bears", BEARS["teddy"]),  # plurals are entries of their own
        ("", {}),
    ],
)
def test_a_text_has_the_kinds_of_its_words(text: str, kinds: dict[str, float]) -> None:
    assert told(text) == numbered(kinds)


def test_words_of_other_scripts_are_found() -> None:
    assert Lexicon({"käse": {"food": 1.0}}).labels(["Ein Käse!"]).names.tolist() == [0]


def test_a_kind_counts_as_much_as_the_word_that_means_it_most() -> None:
    entries = {"one": {"same": 0.2}, "two": {"same": 0.4}, "three": {"same": 0.3}}
    assert Lexicon(entries).labels(["one two three"]).values.tolist() == pytest.approx([0.4])


def test_common_words_are_drawn_more_often() -> None:
    lexicon = Lexicon({f"w{n}": {"thing": 1.0} for n in range(1000)})
    rng = np.random.default_rng(0)
    drawn = np.array([int(lexicon.a_word(rng)[1:]) for _ in range(4000)])
    assert len(set(drawn)) > 900 and drawn.max() < 1000
    for first in (50, 232, 500):
        assert (drawn < first).mean() == pytest.approx(np.log1p(first / COMMON) / np.log1p(1000 / COMMON), abs=0.03)


def written(path: Path, words: Sequence[object], kinds: Sequence[object], weights: Sequence[object]) -> Path:
    pq.write_table(pa.table({"word": words, "kinds": kinds, "weights": weights}), path)
    return path


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = written(
        tmp_path / "kinds.parquet",
        list(BEARS),
        [list(k) for k in BEARS.values()],
        [[*k.values()] for k in BEARS.values()],
    )
    read = read_lexicon(path)
    assert read.words == list(BEARS)
    one, other = read.labels(["a bear"]), Lexicon(BEARS).labels(["a bear"])
    assert one.names.tolist() == other.names.tolist() and one.values.tolist() == other.values.tolist()


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ((["a"], [["k"]], [[0.0]]), "in row 0"),
        ((["a", ""], [["k"], ["k"]], [[1.0], [1.0]]), "in row 1"),
        ((["a"], [["k", "l"]], [[1.0]]), "in row 0"),
        ((["a"], [[]], [[]]), "in row 0"),
        ((["a", None], [["k"], ["k"]], [[1.0], [1.0]]), "in row 1"),
        ((["t-shirt"], [["k"]], [[1.0]]), "the word 't-shirt'"),
        ((["LEGO"], [["k"]], [[1.0]]), "the word 'LEGO'"),
        ((["one two three four"], [["k"]], [[1.0]]), "one to 3"),
        ((["a"], [["k"]], [[float("nan")]]), "in row 0"),
        ((["a"], ["k"], [[1.0]]), "other types"),
        (
            (pa.array([], pa.string()), pa.array([], pa.list_(pa.string())), pa.array([], pa.list_(pa.float32()))),
            "no words",
        ),
    ],
)
def test_a_table_that_tells_no_kinds_is_one_sentence(
    columns: tuple[Sequence[object], Sequence[object], Sequence[object]], what: str, tmp_path: Path
) -> None:
    with pytest.raises(HeadraceError, match=what) as caught:
        read_lexicon(written(tmp_path / "kinds.parquet", *columns))
    assert "--lexicon" in str(caught.value.hint)


def test_no_table_or_another_one_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="there is no lexicon") as caught:
        read_lexicon(tmp_path / "kinds.parquet")
    assert caught.value.code == 3
    pq.write_table(pa.table({"word": ["a"]}), tmp_path / "kinds.parquet")
    with pytest.raises(HeadraceError, match="has no column kinds"):
        read_lexicon(tmp_path / "kinds.parquet")
    (tmp_path / "kinds.parquet").write_text("word,kinds\n")
    with pytest.raises(HeadraceError, match=r"kinds\.parquet") as caught:
        read_lexicon(tmp_path / "kinds.parquet")
    assert "--lexicon" in str(caught.value.hint)
