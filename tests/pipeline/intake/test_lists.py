"""Lists as people publish them: every form, the true columns of known tables, and whatever can be wrong with one."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base import MISSING, USAGE, HeadraceError
from pipeline.fetch.client import normalise_url
from pipeline.intake.lists import PLAIN_URL, open_list, write_urls
from pipeline.intake.rowfiles import BATCH_ROWS
from pipeline.intake.spool import MAX_BUCKETS, write_shards
from pipeline.shards import DataDir, shard_files

URL = "http://a.test/1.jpg"


def written(tmp_path: Path, source: str | Path, shard_size: int = 1000, **columns: str) -> pa.Table:
    data = DataDir(tmp_path / "data")
    parts = write_urls(open_list(source, **columns), data, shard_size)
    tables = [pq.read_table(path) for path in shard_files(data.urls, "parquet")]
    assert [(part.rows, sum(part.fates.values())) for part in parts] == [(len(table), len(table)) for table in tables]
    assert len({table.schema for table in tables}) == 1
    return pa.concat_tables(tables)


def by_row(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: row["row"])


def text_file(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def uid(url: str | None, caption: str | None) -> str:
    return hashlib.sha256(f"{url or ''}\n{caption or ''}".encode()).hexdigest()[:32]


# --- foreign tables ----------------------------------------------------------------------------------


def test_laion(tmp_path: Path) -> None:
    text, real = dict.fromkeys(("URL", "TEXT"), pa.string()), dict.fromkeys(("punsafe", "pwatermark"), pa.float32())
    sides, more = dict.fromkeys(("HEIGHT", "WIDTH"), pa.int32()), dict.fromkeys(("LICENSE", "NSFW"), pa.string())
    laion = {"SAMPLE_ID": pa.float64(), **text, **sides, **more, "similarity": pa.float64(), "hash": pa.int64(), **real}
    schema = pa.schema(list(laion.items()))
    row = [1.5, URL, "a cat", 3, 4, "?", "UNLIKELY", 0.33, -7290274014568454104, 0.1, 0.2]
    pq.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True))], schema), tmp_path / "l.parquet")
    table = written(tmp_path, tmp_path / "l.parquet")
    assert table.column_names[:5] == ["uid", "url", "caption", "fate", "row"]
    got = table.to_pylist()[0]
    assert (got["url"], got["caption"], got["uid"], got["fate"]) == (URL, "a cat", uid(URL, "a cat"), None)
    for field, value in zip(schema, row, strict=True):
        if field.name != "URL":  # SQL cannot tell it from `url`, which holds it
            assert table.schema.field(field.name).type == field.type
            assert got[field.name] == pytest.approx(value)


def test_datacomp_brings_its_own_uids(tmp_path: Path) -> None:
    own = "0123456789abcdef" * 2
    box = pa.list_(pa.list_(pa.float64()))
    source = pa.table(
        {
            "uid": [own, "f" * 32],
            "url": [URL, "http://b.test/2.png"],
            "text": ["a dog", None],
            "original_width": pa.array([640, 3], pa.int64()),
            "original_height": pa.array([480, 4], pa.int64()),
            "clip_b32_similarity_score": pa.array([0.25, 0.5], pa.float32()),
            "clip_l14_similarity_score": pa.array([0.2, 0.4], pa.float32()),
            "face_bboxes": pa.array([[[0.1, 0.2, 0.3, 0.4]], []], box),
            "sha256": ["ab" * 32, "cd" * 32],
        }
    )
    pq.write_table(source, tmp_path / "d.parquet")
    table = written(tmp_path, tmp_path / "d.parquet")
    assert table["uid"].to_pylist() == [own, "f" * 32]
    assert set(table.column_names) == {"fate", "row", "caption", *source.column_names}
    for name in set(source.column_names) - {"uid", "url"}:
        assert table[name].type == source[name].type
        assert table[name].to_pylist() == source[name].to_pylist()


def test_uids_that_are_none_are_kept_apart(tmp_path: Path) -> None:
    path = text_file(tmp_path, "l.csv", f"uid,url,caption\n17,{URL},x\n18,http://b.test/2,y\n")
    assert [row["uid"] for row in by_row(written(tmp_path, path))] == [uid(URL, "x"), uid("http://b.test/2", "y")]
    assert {row["source_uid"] for row in by_row(written(tmp_path, path))} == {17, 18}


def test_cc12m_has_no_header_and_bare_quotes(tmp_path: Path) -> None:
    path = text_file(
        tmp_path, "cc12m.tsv", f'{URL}\t"Hello" said <PERSON>, twice\nhttps://b.test/2?a=1,2\tsecond "one"\n'
    )
    rows = by_row(written(tmp_path, path))
    assert [row["caption"] for row in rows] == ['"Hello" said <PERSON>, twice', 'second "one"']
    assert [row["url"] for row in rows] == [URL, "https://b.test/2?a=1,2"]


def test_cc3m_has_the_caption_first(tmp_path: Path) -> None:
    path = text_file(
        tmp_path, "cc3m.tsv", f"a very typical bus station\t{URL}\nsierra looked stunning\thttp://b.test/2\n"
    )
    rows = by_row(written(tmp_path, path))
    assert [(row["url"], row["caption"]) for row in rows] == [
        (URL, "a very typical bus station"),
        ("http://b.test/2", "sierra looked stunning"),
    ]


def test_coyo(tmp_path: Path) -> None:
    schema = {
        "id": pa.int64(),
        "url": pa.string(),
        "text": pa.string(),
        "num_faces": pa.int8(),
        "watermark_score": pa.float32(),
    }
    source = pa.table(
        {name: pa.array([v], schema[name]) for name, v in zip(schema, [7, URL, "t", 1, 0.5], strict=True)}
    )
    pq.write_table(source, tmp_path / "c.parquet")
    table = written(tmp_path, tmp_path / "c.parquet")
    assert {name: table.schema.field(name).type for name in schema} == schema
    assert table["caption"].to_pylist() == ["t"]


# --- forms and columns -------------------------------------------------------------------------------


def test_every_column_survives_whatever_its_name_or_type(tmp_path: Path) -> None:
    from datetime import date, datetime

    columns = {
        "url": pa.array([URL]),
        "caption": pa.array(["x"]),
        "fate": pa.array(["theirs"]),
        "row": pa.array([99]),
        "Row": pa.array([98]),
        "key": pa.array([b"\xff\0"]),
        "when": pa.array([datetime(2020, 1, 2, 3, 4, 5)], pa.timestamp("ns")),
        "day": pa.array([date(2020, 1, 2)]),
        "struct": pa.array([{"a": [1, None], "b": {"c": "d"}}]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
        "half": pa.array([0.5], pa.float16()),
        "decimal": pa.array([1], pa.int64()).cast(pa.decimal128(30, 2)),
        "category": pa.array(["c"]).dictionary_encode(),
        "empty": pa.nulls(1),
        "sp ace, 'ü\"": pa.array([True]),
    }
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    table = written(tmp_path, tmp_path / "l.parquet")
    names = {"fate": "source_fate", "Row": "source_Row"}
    for name, column in columns.items():
        assert table[names.get(name, name)].to_pylist() == column.to_pylist(), name
        if name not in ("category", "empty"):
            assert table.schema.field(names.get(name, name)).type == column.type
    assert table["fate"].to_pylist() == [None]
    import duckdb

    assert duckdb.connect().execute(f"select * from '{tmp_path}/data/urls/*.parquet'").fetchall()


@pytest.mark.parametrize(
    "name", ["l.csv", "l.tsv", "l.jsonl", "l.json", "l.csv.gz", "l.jsonl.zst", "l.tsv.zst", "s.csv"]
)
def test_forms_agree(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {"url": "http://ü.test/a b,c.jpg", "caption": "zwei\\, ‘Bücher’", "n": 5, "score": 0.25},
        {"url": URL, "caption": None, "n": -3, "score": 1e-7},
    ]
    cells = [list(rows[0]), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in line] for line in cells]
    form = name.removesuffix(".gz").removesuffix(".zst").partition(".")[2]
    text = {
        "csv": "\ufeff" + "\r\n".join((";" if name == "s.csv" else ",").join(line) for line in quoted),
        "tsv": "\n".join("\t".join(line) for line in cells),
        "jsonl": "\n".join(json.dumps(row) for row in rows),
        "json": json.dumps(rows, indent=2, ensure_ascii=False),
    }[form].encode()
    pack = {"gz": gzip.compress, "zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True)}
    path = text_file(tmp_path, name, pack.get(name.rpartition(".")[2], bytes)(text))
    got = by_row(written(tmp_path, path))
    assert [{key: row[key] for key in rows[0]} for row in got] == rows


def test_txt_is_a_url_per_line(tmp_path: Path) -> None:
    path = text_file(tmp_path, "l.txt", 'http://a.test/x,y z.jpg?q="1"\r\n\n  http://ü.test/é  \nnot a url\n')
    rows = by_row(written(tmp_path, path))
    assert [row["url"] for row in rows] == ['http://a.test/x,y z.jpg?q="1"', "http://ü.test/é", "not a url"]
    assert [row["fate"] for row in rows] == [None, None, "urls:invalid_url"]
    assert {row["caption"] for row in rows} == {None}


def test_numbers_in_text_keep_their_digits(tmp_path: Path) -> None:
    head = "url,count,ratio,code,big,mixed\n"
    path = text_file(tmp_path, "l.csv", head + f"{URL},1,0.5,007,9223372036854775808,1\nhttp://b.test/,-2,3,12,1,x\n")
    table = written(tmp_path, path)
    kinds = [table.schema.field(name).type for name in ("count", "ratio", "code", "big", "mixed")]
    assert kinds == [pa.int64(), pa.float64(), pa.string(), pa.string(), pa.string()]
    assert by_row(table)[0]["code"] == "007"


def test_columns_asked_for(tmp_path: Path) -> None:
    path = text_file(tmp_path, "l.csv", f"picture,url,words\n{URL},other,w\n")
    row = by_row(written(tmp_path, path, url_col="picture", caption_col="words"))[0]
    assert (row["url"], row["caption"], row["source_url"], row["picture"]) == (URL, "w", "other", URL)


def test_a_glob_of_differing_schemas_is_unified(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [URL], "n": pa.array([1], pa.int32()), "x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": ["http://b.test/"], "n": [2.5], "x": ["one"], "y": [[1]]}), tmp_path / "b.parquet")
    rows = by_row(written(tmp_path, str(tmp_path / "*.parquet")))
    assert [(row["n"], row["x"], row["y"]) for row in rows] == [(1.0, "1", None), (2.5, "one", [1])]
    assert by_row(written(tmp_path, tmp_path)) == rows  # the folder


def test_an_object_without_fields_is_kept_as_text(tmp_path: Path) -> None:
    rows = [{"url": URL, "exif": {}}, {"url": f"{URL}?2", "exif": {}, "more": [{"a": {}}]}]
    table = written(tmp_path, text_file(tmp_path, "l.jsonl", "\n".join(map(json.dumps, rows))))
    assert [row["exif"] for row in by_row(table)] == ["{}", "{}"]


def test_files_that_name_their_captions_differently_are_refused(tmp_path: Path) -> None:
    text_file(tmp_path, "a.csv", f"url,caption\n{URL},one\n")
    text_file(tmp_path, "b.csv", f"url,TEXT\n{URL}?2,two\n")
    with pytest.raises(HeadraceError, match=r"b\.csv: its captions seem to be in `TEXT`, those of a\.csv in `caption`"):
        open_list(str(tmp_path / "*.csv"))
    assert open_list(str(tmp_path / "*.csv"), caption_col="caption").caption_col == "caption"


def test_a_list_that_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    lines = "".join(f"{URL}?{i}\n" for i in range(5))
    many = written(tmp_path, text_file(tmp_path, "l.txt", lines), shard_size=2)
    assert len(many) == 5 == len(written(tmp_path, tmp_path / "l.txt", shard_size=1000))


def test_json_of_changing_types(tmp_path: Path) -> None:
    lines = [
        {"url": URL, "a": 1},
        {"url": "http://b.test/", "a": {"b": "\ud800"}, "c": [1]},
        {"url": "http://c.test/", "a": "t"},
    ]
    path = text_file(tmp_path, "l.jsonl", "\n".join(map(json.dumps, lines)) + '\n{"url": broken\n[1]\n')
    rows = by_row(written(tmp_path, path))
    assert [row["a"] for row in rows] == ["1", '{"b": "\ufffd"}', "t", None, None]
    assert [row["fate"] for row in rows] == [None] * 3 + ["urls:malformed_row"] * 2


# --- identity, order, fates --------------------------------------------------------------------------


def test_rows_are_ordered_by_uid_and_repeats_marked(tmp_path: Path) -> None:
    lines = ["url,caption", *(f"http://h{i % 4}.test/{i % 40},c{i % 2}" for i in range(100))]
    table = written(tmp_path, text_file(tmp_path, "l.csv", "\n".join(lines)), shard_size=30)
    order = list(zip(table["uid"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert order == sorted(order)
    seen: set[str] = set()
    for row in by_row(table):
        assert row["fate"] == ("urls:repeated" if row["uid"] in seen else None)
        assert row["uid"] == uid(row["url"], row["caption"])
        seen.add(row["uid"])
    assert len(seen) < 100


def test_fates_before_the_fetch(tmp_path: Path) -> None:
    urls = {
        "": "urls:no_url",
        "   ": "urls:no_url",
        "ftp://a.test/x.jpg": "urls:scheme",
        "file:///etc/passwd": "urls:scheme",
        "javascript:alert(1)": "urls:scheme",
        "http://": "urls:invalid_url",
        "http://a b/": "urls:invalid_url",
        "nothing": "urls:invalid_url",
        "http://a.test/\ufffd": "urls:invalid_url",
        "http://a.test/\0": "urls:invalid_url",
        " http://a.test/with spaces.jpg": None,
        "HTTP://EXAMPLE.test": None,
    }
    pq.write_table(pa.table({"url": [None, *urls]}), tmp_path / "l.parquet")
    rows = by_row(written(tmp_path, tmp_path / "l.parquet"))
    assert [row["fate"] for row in rows] == ["urls:no_url", *urls.values()]
    assert [row["url"] for row in rows] == [None, *urls]


def test_an_unfetchable_row_does_not_hide_a_later_one_of_its_uid(tmp_path: Path) -> None:
    own = "a" * 32
    pq.write_table(pa.table({"uid": [own] * 3, "url": ["ftp://x/", URL, URL]}), tmp_path / "l.parquet")
    fates = [row["fate"] for row in by_row(written(tmp_path, tmp_path / "l.parquet"))]
    assert fates == ["urls:scheme", None, "urls:repeated"]


@given(st.from_regex(PLAIN_URL.replace("$", r"\Z"), fullmatch=True))
def test_what_looks_plain_is_a_url(url: str) -> None:
    assert normalise_url(url)[1] is None


def test_same_bytes_whatever_the_form_buckets_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(
        pa.table({"url": [f"http://h.test/{i}" for i in range(5000)], "caption": ["c"] * 5000}), tmp_path / "l.parquet"
    )
    digests = []
    for i, (buckets, batch) in enumerate([(1 << 40, 5000), (1, BATCH_ROWS), (30, 100)]):
        monkeypatch.setattr("pipeline.intake.spool.BUCKET_BYTES", buckets)
        monkeypatch.setattr("pipeline.intake.rowfiles.BATCH_ROWS", batch)
        monkeypatch.setattr("pipeline.intake.spool.BATCH_ROWS", batch)
        data = DataDir(tmp_path / str(i))
        write_urls(open_list(tmp_path / "l.parquet"), data, 777)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in shard_files(data.urls, "parquet")])
        assert sorted(path.name for path in data.root.iterdir()) == ["urls"]
    assert len(digests[0]) == 7
    assert digests[0] == digests[1] == digests[2]
    assert MAX_BUCKETS > 30


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    for name, text in (("a.csv", f"url\n{URL}"), ("b.csv", f"url\n{URL}"), ("c.csv", f"url\n{URL}2")):
        text_file(tmp_path, name, text)
    a, b, c = (open_list(tmp_path / f"{name}.csv").fingerprint() for name in "abc")
    assert a == b != c


# --- bad input ---------------------------------------------------------------------------------------


def refusal(source: Any, **columns: str) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        found = open_list(source, **columns)
        for file in found.files:
            list(file.batches())
        write_urls(found, DataDir(Path(found.files[0].path).parent / "data"), 10)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_missing(tmp_path: Path) -> None:
    for source in (tmp_path / "no.csv", f"{tmp_path}/*.parquet", tmp_path):
        error = refusal(source)
        assert error.code == MISSING
        assert str(tmp_path) in error.message


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = text_file(tmp_path, "l.csv", f"URL,TEXT,similarity\n{URL},x,1\n")
    error = refusal(path, caption_col="txt")
    assert "`txt`" in error.message
    assert "`URL`, `TEXT`, `similarity`" in error.message
    assert error.hint == "did you mean --caption-col TEXT?"
    assert "--url-col" in (refusal(text_file(tmp_path, "m.csv", "a,b\n1,2\n")).hint or "")
    text_file(tmp_path, "n1.csv", f"url\n{URL}")
    text_file(tmp_path, "n2.csv", f"link\n{URL}")
    assert "n2.csv" in refusal(f"{tmp_path}/n*.csv").message


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("e.csv", b"", "empty"),
        ("e.txt", b"\n\n", "empty"),
        ("h.csv", b"url,caption\n", "empty"),
        ("e.json", b"[]", "empty"),
        ("e.parquet", b"", "cannot be read"),
        ("b.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "cannot be read"),
        ("b.csv.gz", b"\x1f\x8bnope", "cannot be read"),
        ("b.json", b'[{"url": "http://a.test/"}, {"url": ', "after element 1"),
        ("o.json", b'"text"', "cannot be read"),
        ("x.xlsx", b"PK", "no table"),
        ("q.csv", b'url,caption\nhttp://a.test/,"' + b"x" * (17 << 20), "line 2"),
    ],
)  # fmt: skip
def test_unusable(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    error = refusal(text_file(tmp_path, name, content))
    assert error.code == USAGE
    assert word in error.message
    assert name in error.message


def test_parquet_damaged_in_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": [f"http://h.test/{i}" for i in range(3000)]}), path, use_dictionary=False)
    body = bytearray(path.read_bytes())
    body[4:2000] = b"\xff" * 1996
    path.write_bytes(body)
    assert "cannot be read" in refusal(path).message


def test_text_that_is_none(tmp_path: Path) -> None:
    raw = b"url,caption,other\nhttp://a.test/1,caf\xe9 and \0 nul,\xff\nhttp://a.test/\xe9,x,y\n"
    rows = by_row(written(tmp_path, text_file(tmp_path, "l.csv", raw)))
    assert [row["caption"] for row in rows] == ["caf\ufffd and \ufffd nul", "x"]
    assert [row["fate"] for row in rows] == [None, "urls:invalid_url"]
    assert rows[0]["other"] == "\ufffd"
    bad = pa.array([b"caf\xe9"], pa.binary())
    column = pa.StringArray.from_buffers(1, *bad.buffers()[1:])
    pq.write_table(pa.table({"url": [URL], "caption": column, "other": column, "raw": bad}), tmp_path / "l.parquet")
    row = by_row(written(tmp_path, tmp_path / "l.parquet"))[0]
    assert (row["caption"], row["other"], row["raw"]) == ("caf\ufffd", "caf\ufffd", b"caf\xe9")


def test_utf16_from_a_spreadsheet(tmp_path: Path) -> None:
    path = text_file(tmp_path, "l.csv", f"url\tcaption\n{URL}\tgrün\n".encode("utf-16"))
    assert by_row(written(tmp_path, path))[0]["caption"] == "grün"


def test_ragged_and_quoted_rows(tmp_path: Path) -> None:
    text = f'url,caption,n\n{URL},"two\nlines, ""quoted""",1\nhttp://b.test/1,short\nhttp://b.test/2,too,3,many\n\nhttp://b.test/3,,4\n'
    rows = by_row(written(tmp_path, text_file(tmp_path, "l.csv", text)))
    assert [row["caption"] for row in rows] == ['two\nlines, "quoted"', "short", "too", None]
    assert [row["fate"] for row in rows] == [None, None, "urls:malformed_row", None]
    assert [row["n"] for row in rows] == [1, None, 3, 4]


def test_a_caption_of_a_megabyte_and_null_ones(tmp_path: Path) -> None:
    long = "wörd " * 200_000
    pq.write_table(pa.table({"url": [URL, URL, "http://b.test/"], "caption": [long, None, ""]}), tmp_path / "l.parquet")
    assert [row["caption"] for row in by_row(written(tmp_path, tmp_path / "l.parquet"))] == [long, None, ""]
    path = text_file(tmp_path, "l.csv", f'url,caption\n{URL},"{long}"\n')
    assert by_row(written(tmp_path, path))[0]["caption"] == long


def test_a_column_of_lists_is_no_caption(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [URL], "caption": [["a", "b"]]}), tmp_path / "l.parquet")
    assert "not text" in refusal(tmp_path / "l.parquet").message


def test_no_rows_no_shards(tmp_path: Path) -> None:
    assert write_shards(iter(()), DataDir(tmp_path), 10, 0) == []


MEASURE = """
import resource, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from pipeline.intake import spool
from pipeline.intake.lists import open_list, write_urls
from pipeline.shards import DataDir
spool.BUCKET_BYTES = 8 << 20
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
with pq.ParquetWriter(folder / "l.parquet", pa.schema([("url", pa.string()), ("text", pa.string())])) as file:
    for at in range(0, rows, 50_000):
        numbers = range(at, at + 50_000)
        columns = {"url": [f"http://h{i % 97}.test/{i}" for i in numbers], "text": [f"{i} " * 10 for i in numbers]}
        file.write_table(pa.table(columns))
write_urls(open_list(folder / "l.parquet"), DataDir(folder / "data"), 10_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_stays_flat_as_rows_grow_tenfold(tmp_path: Path) -> None:
    peaks = []
    for rows in (300_000, 3_000_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        command = [sys.executable, "-c", MEASURE, str(folder), str(rows)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
    assert peaks[1] < 1.3 * peaks[0], peaks
