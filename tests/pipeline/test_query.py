"""How answers of `curate query` leave: text, JSON, files. The SQL itself runs in the real locked DuckDB."""

import csv
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import query
from pipeline.base import HeadraceError
from pipeline.page.plaintext import harmless_cell, host
from tests.pipeline.factory import Row, make_raw, picture

FORMULAS = ['=HYPERLINK("http://x")', "+1", "-1+2", "@SUM(A1)", "\tx", " =cmd", "＝1"]


def reader(**columns) -> pa.RecordBatchReader:
    return pa.table(columns).to_reader(max_chunksize=3)


@pytest.fixture
def data(tmp_path):
    return make_raw(tmp_path / "data", [Row(picture(i, 32), text) for i, text in enumerate(["a cat", "=1+1", "ünï"])])


def test_prints_a_table(data, capsys):
    query.run(data, "SELECT caption, width FROM raw ORDER BY key", None, False)
    assert capsys.readouterr().out.splitlines() == [
        "caption  width",
        "a cat       32",
        "=1+1        32",
        "ünï         32",
        "(3 rows)",
    ]


def test_prints_json_lines(data, capsys):
    query.run(data, "SELECT key, caption FROM raw ORDER BY key", None, True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["caption"] for line in lines] == ["a cat", "=1+1", "ünï"]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_writes_files(data, tmp_path, capsys, suffix):
    out = tmp_path / f"answer.{suffix}"
    query.run(data, "SELECT key, caption, width FROM raw ORDER BY key", out, False)
    assert capsys.readouterr().out == f"3 rows written to {out}\n"
    if suffix == "parquet":
        assert pq.read_table(out)["caption"].to_pylist() == ["a cat", "=1+1", "ünï"]
    elif suffix == "csv":
        rows = list(csv.reader(out.open(encoding="utf-8", newline="")))
        assert rows[0] == ["key", "caption", "width"]
        assert [row[1:] for row in rows[1:]] == [["a cat", "32"], ["'=1+1", "32"], ["ünï", "32"]]
    else:
        assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == ["a cat", "=1+1", "ünï"]


def test_a_strange_suffix_is_refused_before_anything_runs(data, tmp_path):
    with pytest.raises(HeadraceError, match="no known kind") as error:
        query.run(data, "SELECT nonsense", tmp_path / "answer.xls", False)
    assert error.value.code == 2


def test_a_failing_answer_leaves_no_file(data, tmp_path):
    out = tmp_path / "answer.csv"
    with pytest.raises(HeadraceError):
        query.run(data, "SELECT CAST(caption AS INTEGER) FROM raw", out, False)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_neutralised(tmp_path, text):
    query.write_csv(reader(cell=[text], **{text: [1]}), tmp_path / "a.csv")
    for row in csv.reader((tmp_path / "a.csv").open(encoding="utf-8", newline="")):
        for cell in row:
            assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝"))


def test_numbers_stay_numbers_in_csv(tmp_path):
    query.write_csv(reader(n=[-1.5], words=[["-a", "b"]]), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == 'n,words\n-1.5,"[""-a"", ""b""]"\n'


def test_json_has_a_form_for_every_value():
    columns = {
        "nan": [float("nan")],
        "bytes": [b"\x00\xff"],
        "when": [datetime(2020, 1, 2)],
        "nested": [{"a": [1, float("inf")]}],
        "null": pa.array([None], pa.string()),
    }
    (line,) = query.json_lines(reader(**columns))
    expected = {"nan": None, "bytes": "00ff", "when": "2020-01-02T00:00:00", "nested": {"a": [1, None]}, "null": None}
    assert json.loads(line) == expected


def test_columns_of_one_name_all_stay():
    batch = pa.record_batch([pa.array([1]), pa.array([2])], names=["a", "a"])
    one = pa.RecordBatchReader.from_batches(batch.schema, [batch])
    assert json.loads(next(query.json_lines(one))) == {"a": 1, "a_1": 2}


def test_rows_and_columns_are_bounded():
    shown = query.text(reader(**{f"column{i}": ["x" * 500] * 200 for i in range(30)}), width=120).splitlines()
    assert len(shown) == query.ROWS + 3
    assert max(map(len, shown[:-2])) <= 120
    assert "first 50 rows" in shown[-2]
    assert "column2, column3" in shown[-1]


def test_wide_characters_and_vectors():
    shown = query.text(reader(text=["漢字", "ab"], v=[[1.0, 2.0, 3.0, 4.0, 5.0], None]), width=100).splitlines()
    assert shown[1] == "漢字  [1, 2, 3, 4, … 5 values]"
    assert shown[2] == "ab    NULL"


def test_a_terminal_is_not_driven_by_a_caption():
    shown = query.text(reader(text=["\x1b[2Jgone\u202egnp\x9b1m\nnext"]), width=200)
    assert "\x1b" not in shown and "\u202e" not in shown and "\x9b" not in shown
    assert "\\u001b[2Jgone\\u202egnp\\u009b1m\\nnext" in shown


def test_no_rows():
    assert query.text(reader(a=pa.array([], pa.int64())), width=80).splitlines() == ["a", "(0 rows)"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://user:pw@Host.test:80/a", "host.test:80"),
        ("https://h?x=/y@z", "h"),
        ("folder/sub/a.jpg", "folder/sub"),
        ("", ""),
        ("http://a\\@b/", "a"),
    ],
)
def test_host(url, name):
    assert host(url) == name


def test_a_cell_that_begins_no_formula_is_as_it_was():
    assert harmless_cell("a=b") == "a=b"
