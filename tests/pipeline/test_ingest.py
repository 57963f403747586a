"""One test per form of source, and what can be wrong with one; the outcome is what `download` leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base import MISSING, REFUSED, USAGE, HeadraceError
from pipeline.books import books, raw_markers
from pipeline.ingest import IngestConfig, run, sample_key
from pipeline.shards import DataDir, TarWriter, read_tar, shard_files, tar_members
from tests.pipeline.factory import Row, jpeg, make_raw, picture

CORPUS = Path(__file__).parents[2] / "../shared/corpus"


def ingest(
    tmp_path: Path, source: str | Path, name: str = "data", workers: int = 1, **settings: Any
) -> dict[str, dict[str, Any]]:
    """Run the stage; rows of `urls/` and `raw/` together, by URL, their books checked."""
    data = DataDir(tmp_path / name)
    summary = run(IngestConfig(source=str(source), **settings), data, workers)
    urls = pa.concat_tables([pq.read_table(path) for path in shard_files(data.urls, "parquet")])
    raw = pa.concat_tables([pq.read_table(path) for path in shard_files(data.raw, "parquet")])
    assert summary.rows == len(raw) == sum(summary.fates.values()) == sum(marker.rows for marker in raw_markers(data))
    assert books(data, "list").rows == len(urls)
    assert urls["uid"].to_pylist() == sorted(urls["uid"].to_pylist())
    samples = [sample for path in shard_files(data.raw, "tar") for sample in read_tar(path)]
    good = raw.filter(pa.array([status == "success" for status in raw["status"].to_pylist()])).to_pylist()
    assert [sample.key for sample in samples] == [row["key"] for row in good]
    for sample, row in zip(samples, good, strict=True):
        assert list(sample.files) == ["jpg", "txt", "json"]
        assert sample.files["txt"].decode() == (row["caption"] or "")
        assert json.loads(sample.files["json"]) == row
        row["picture"] = sample.image()
    fetched = {row["uid"]: row for row in [*raw.to_pylist(), *good]}
    return {
        f"{row['url']}|{row['row']}" if row["fate"] else row["url"]: row | fetched[row["uid"]]
        for row in urls.to_pylist()
    }


def put(root: Path, name: str, body: bytes | str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    return path


def tar_of(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        tar = TarWriter(file)
        for name, body in members.items():
            tar.add(name, body.encode() if isinstance(body, str) else body)
        tar.close()
    return path


def picture_bytes(seed: int) -> bytes:
    return jpeg(picture(seed))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    return root


# --- forms -------------------------------------------------------------------------------------------


def test_a_folder_with_captions_beside(tmp_path: Path, source: Path) -> None:
    put(source, "a/one.jpg", picture_bytes(1))
    put(source, "a/one.txt", "\ufefffirst caption\n\nsecond caption\n")
    put(source, "b.c.PNG", png := _png(2))
    put(source, "b.c.json", json.dumps({"text": "from json", "tags": ["x"], "score": 0.5, "source_file": "theirs"}))
    put(source, "none.webp", _png(3))
    put(source, ".hidden.jpg", picture_bytes(4))
    put(source, "notes.md", "no picture")
    rows = ingest(tmp_path, source)
    assert set(rows) == {"a/one.jpg", "b.c.PNG", "none.webp"}
    one, two, three = rows["a/one.jpg"], rows["b.c.PNG"], rows["none.webp"]
    assert (one["caption"], one["captions"]) == ("first caption", ["first caption", "second caption"])
    assert one["uid"] == hashlib.sha256(b"a/one.jpg\nfirst caption").hexdigest()[:32]
    assert one["picture"] == picture_bytes(1)
    assert (two["caption"], two["text"], two["tags"], two["score"]) == ("from json", "from json", ["x"], 0.5)
    assert (two["source_file"], two["source_source_file"]) == ("b.c.PNG", "theirs")
    assert (two["sha256"], two["format"], two["bytes"]) == (hashlib.sha256(png).hexdigest(), "png", len(png))
    assert (three["caption"], three["captions"]) == (None, None)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_imagefolder_metadata(tmp_path: Path, source: Path, form: str) -> None:
    put(source, "train/x/1.jpg", picture_bytes(1))
    put(source, "train/2.jpg", picture_bytes(2))
    put(source, "train/2.txt", "beside")
    put(source, "train/unsaid.jpg", picture_bytes(3))
    table = pa.table(
        {
            "file_name": ["./x/1.jpg", "2.jpg", "gone.jpg", "x/1.jpg"],
            "text": ["one", None, "lost", "also one"],
            "n": pa.array([1, 2, 3, 4], pa.int64()),
        }
    )
    path = source / f"train/metadata.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        path.write_text(
            "file_name,text,n\n"
            + "\n".join(f"{a},{b or ''},{c}" for a, b, c in zip(*table.to_pydict().values(), strict=True))
        )
    data = DataDir(tmp_path / "data")
    run(IngestConfig(source=str(source)), data)
    rows = pq.read_table(data.urls / "00000.parquet").to_pylist()
    got = sorted((row["url"], row["caption"] or "", row["n"] or 0, row["source_error"] or "") for row in rows)
    assert got == [
        ("train/2.jpg", "beside", 2, ""),
        ("train/gone.jpg", "lost", 3, "missing_file"),
        ("train/unsaid.jpg", "", 0, ""),
        ("train/x/1.jpg", "also one", 4, ""),
        ("train/x/1.jpg", "one", 1, ""),
    ]
    assert raw_markers(data)[0].fates == {"fetched": 4, "fetch:missing_file": 1}


def test_a_tar_with_a_captions_table(tmp_path: Path, source: Path) -> None:
    names = [f"part/{i}.v1.jpg" for i in range(5)]
    tar_of(source / "images.tar", {name: picture_bytes(i) for i, name in enumerate(names)})
    table = pa.table(
        {"path": names, "caption": [f"caption {i}" for i in range(5)], "width": pa.array(range(5), pa.int16())}
    )
    pq.write_table(table, source / "captions.parquet")
    rows = ingest(tmp_path, source)
    assert {url: row["caption"] for url, row in rows.items()} == {
        f"images.tar/{n}": f"caption {i}" for i, n in enumerate(names)
    }
    assert pq.read_schema(tmp_path / "data/urls/00000.parquet").field("width").type == pa.int16()
    other = ingest(tmp_path, source / "images.tar", "other", captions=str(source / "captions.parquet"))
    assert {url: row["caption"] for url, row in other.items()} == {n: f"caption {i}" for i, n in enumerate(names)}


def test_webdataset_tars(tmp_path: Path, source: Path) -> None:
    tar_of(
        source / "00/s-0.tar",
        {"a.jpg": picture_bytes(1), "a.txt": "two\nlines", "b.seg.png": b"x", "b.png": _png(2), "b.txt": "b"},
    )
    tar_of(
        source / "00/s-1.tar",
        {"a.cls": "7", "a.json": '{"caption": "from json", "url": "https://h.test/a"}', "a.jpg": picture_bytes(3)},
    )
    rows = ingest(tmp_path, source)
    assert {url: row["caption"] for url, row in rows.items()} == {
        "00/s-0.tar/a.jpg": "two\nlines",
        "00/s-0.tar/b.png": "b",
        "https://h.test/a": "from json",
    }
    assert {row["status"] for row in rows.values()} == {"success"}
    globbed = ingest(tmp_path, f"{source}/00/*-1.tar", "other")
    assert set(globbed) == {"https://h.test/a"}


def test_gpic_has_its_caption_in_json_before_the_picture(tmp_path: Path, source: Path) -> None:
    said = {
        "caption": "a lake",
        "license": "cc0",
        "attribution": "A. B.",
        "retrieved_at": "2026-01-02",
        "url": "http://h.test/1",
    }
    tar_of(
        source / "g.tar",
        {
            "k1.json": json.dumps(said),
            "k1.png": _png(1),
            "k2.json": json.dumps({"caption": None}),
            "k2.jpg": picture_bytes(2),
        },
    )
    rows = ingest(tmp_path, source)
    first = rows["http://h.test/1"]
    assert {name: first[name] for name in said} == said
    assert rows["g.tar/k2.jpg"]["caption"] is None


def test_an_img2dataset_output(tmp_path: Path, source: Path) -> None:
    names = ["url", "caption", "license", "key", "status", "error_message", "width", "when"]
    table = pa.table(
        [
            ["http://h.test/1", "http://h.test/2", "http://h.test/3", "http://h.test/4"],
            ["one", None, "three", "four"],
            ["a", "b", "c", "d"],
            ["000000000", "000000001", "000000002", "000000003"],
            ["success", "failed_to_download", "failed_to_resize", "success"],
            [None, "HTTP Error 404: Not Found", "Image decoding error", None],
            pa.array([96, None, None, 5], pa.int32()),
            pa.array([1, 2, 3, 4], pa.timestamp("ms")),
        ],
        names=names,
    )
    pq.write_table(table, source / "00000.parquet")
    put(source, "00000_stats.json", "{}")
    body: dict[str, bytes | str] = {
        "000000000.jpg": picture_bytes(1),
        "000000000.json": '{"caption": "not this", "extra": 1}',
        "000000000.txt": "one",
    }
    tar_of(source / "00000.tar", body)
    rows = ingest(tmp_path, source)
    assert {url[-1]: (row["status"], row["error_message"]) for url, row in rows.items()} == {
        "1": ("success", None),
        "2": ("failed_to_download", "http_404: HTTP Error 404: Not Found"),
        "3": ("failed_to_resize", "corrupt: Image decoding error"),
        "4": ("failed_to_download", "missing_file: its tar does not hold it"),
    }
    assert [rows[f"http://h.test/{i}"]["caption"] for i in (1, 2, 3, 4)] == ["one", None, "three", "four"]
    urls = pq.read_table(tmp_path / "data/urls/00000.parquet")
    assert set(names) <= set(urls.column_names)
    assert urls.schema.field("when").type == pa.timestamp("ms")
    assert raw_markers(DataDir(tmp_path / "data"))[0].fates == {
        "fetched": 1, "fetch:http_404": 1, "image:corrupt": 1, "fetch:missing_file": 1
    }  # fmt: skip


def test_our_own_raw_shards_come_back_as_they_are(tmp_path: Path) -> None:
    rows = [*(Row(picture(i), f"caption {i}") for i in range(10)), Row(None, "gone", error="http_410: gone")]
    first = make_raw(tmp_path / "first", rows)
    again = ingest(tmp_path, first.raw)
    before = {row["uid"]: row for path in shard_files(first.raw, "parquet") for row in pq.read_table(path).to_pylist()}
    assert {row["uid"] for row in again.values()} == set(before)
    for row in again.values():
        for name in ("url", "caption", "status", "error_message", "sha256", "width"):
            assert row[name] == before[row["uid"]][name], name


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus is not here")
def test_a_slice_of_the_corpus(tmp_path: Path, source: Path) -> None:
    table = pq.read_table(CORPUS / "captions.parquet").slice(0, 200)
    wanted, body = set(table["path"].to_pylist()), (CORPUS / "images.tar").read_bytes()
    members = [member for member in tar_members(CORPUS / "images.tar") if member.name in wanted]
    slice_tar = {name: body[at : at + length] for name, at, length in members}
    tar_of(source / "images.tar", dict(slice_tar))
    pq.write_table(table, source / "captions.parquet")
    rows = ingest(tmp_path, source, shard_size=64)
    assert len(rows) == 200
    by_path = {row["path"]: row for row in table.to_pylist()}
    for url, row in rows.items():
        said = by_path[url.removeprefix("images.tar/")]
        assert row["status"] == "success"
        assert (row["caption"], row["width"], row["height"]) == (said["caption"], said["width"], said["height"])
        assert row["picture"] == slice_tar[said["path"]]


# --- order, resume, determinism ----------------------------------------------------------------------


def test_shards_keys_and_bytes_do_not_depend_on_workers(tmp_path: Path, source: Path) -> None:
    for i in range(25):
        put(source, f"{i}.jpg", jpeg(picture(i, 280 if i % 5 == 0 else 64)))
        put(source, f"{i}.txt", f"caption {i}")
    for workers in (1, 2):
        ingest(tmp_path, source, f"w{workers}", workers=workers, shard_size=10)
    files = {
        path.relative_to(tmp_path / "w1")
        for path in (tmp_path / "w1").rglob("*")
        if path.suffix in (".tar", ".parquet")
    }
    assert len(files) == 9
    for path in files:
        assert (tmp_path / "w1" / path).read_bytes() == (tmp_path / "w2" / path).read_bytes(), path
    keys = [
        pq.read_table(path, columns=["key"])["key"].to_pylist() for path in shard_files(tmp_path / "w1/raw", "parquet")
    ]
    assert [shard[0] for shard in keys] == ["000000", "000010", "000020"]
    stats = json.loads((tmp_path / "w1/raw/00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (10, 10, {"success": 10})


def test_keys_are_those_of_img2dataset() -> None:
    from img2dataset.downloader import compute_key

    for size, shard, row in ((1, 3, 0), (10, 3, 9), (1000, 12, 999), (10_000, 99_999, 1), (1001, 7, 1000)):
        import math

        assert sample_key(shard, row, size) == compute_key(row, shard, math.ceil(math.log10(size)), 5)


def test_a_second_run_does_nothing_and_another_source_is_refused(tmp_path: Path, source: Path) -> None:
    put(source, "1.jpg", picture_bytes(1))
    ingest(tmp_path, source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.parquet")}
    ingest(tmp_path, source)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.parquet")}
    with pytest.raises(HeadraceError) as settings:
        ingest(tmp_path, source, image={"image_size": 64})
    put(source, "2.jpg", picture_bytes(2))
    with pytest.raises(HeadraceError) as other:
        ingest(tmp_path, source)
    assert settings.value.code == other.value.code == REFUSED
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.parquet")}


def test_a_lost_shard_is_made_again(tmp_path: Path, source: Path) -> None:
    for i in range(5):
        put(source, f"{i}.jpg", picture_bytes(i))
    ingest(tmp_path, source, shard_size=2)
    tar, table = tmp_path / "data/raw/00001.tar", tmp_path / "data/urls/00002.parquet"
    kept = tar.read_bytes(), table.read_bytes()
    tar.unlink()
    table.write_bytes(b"PAR1")
    ingest(tmp_path, source, shard_size=2)
    assert (tar.read_bytes(), table.read_bytes()) == kept


# --- bad input ---------------------------------------------------------------------------------------


def test_broken_pictures_are_rows(tmp_path: Path, source: Path) -> None:
    put(source, "html.jpg", "<html>not found</html>")
    put(source, "empty.jpg", b"")
    put(source, "cut.jpg", jpeg(picture(1, 200))[:2000])
    put(source, "big.jpg", jpeg(picture(2)) + b"\0" * 300_000)
    put(source, "thin.png", _png_of((4, 400)))
    os.mkfifo(source / "pipe.jpg")
    rows = ingest(tmp_path, source, max_bytes=200_000)
    assert {url: (row["status"], row["error_message"].partition(":")[0]) for url, row in rows.items()} == {
        "html.jpg": ("failed_to_resize", "not_an_image"),
        "empty.jpg": ("failed_to_resize", "empty"),
        "cut.jpg": ("failed_to_resize", "corrupt"),
        "big.jpg": ("failed_to_download", "too_large"),
        "thin.png": ("failed_to_resize", "aspect"),
        "pipe.jpg": ("failed_to_download", "unreadable"),
    }
    assert rows["html.jpg"]["sha256"] == hashlib.sha256(b"<html>not found</html>").hexdigest()


def test_links_are_not_followed_out_of_the_source(tmp_path: Path, source: Path) -> None:
    outside = put(tmp_path, "secret.jpg", picture_bytes(1))
    put(tmp_path, "secret.txt", "secret")
    put(source, "real.jpg", picture_bytes(2))
    (source / "out.jpg").symlink_to(outside)
    (source / "real.txt").symlink_to(tmp_path / "secret.txt")
    (source / "in.jpg").symlink_to("real.jpg")
    (source / "dangling.jpg").symlink_to("nowhere")
    (source / "folder").symlink_to(tmp_path, target_is_directory=True)
    rows = ingest(tmp_path, source)
    assert {url: row["status"] for url, row in rows.items()} == {
        "out.jpg": "failed_to_download",
        "dangling.jpg": "failed_to_download",
        "real.jpg": "success",
        "in.jpg": "success",
    }
    assert rows["out.jpg"]["error_message"].startswith("outside: ")
    assert rows["real.jpg"]["caption"] is None


def test_duplicates_of_a_row_meet_their_fate(tmp_path: Path, source: Path) -> None:
    put(source, "1.jpg", picture_bytes(1))
    put(source, "metadata.csv", "file_name,text\n1.jpg,same\n1.jpg,same\n1.jpg,other\n")
    rows = ingest(tmp_path, source)
    fates = [row["fate"] for row in pq.read_table(tmp_path / "data/urls/00000.parquet").to_pylist()]
    assert sorted(map(str, fates)) == ["None", "None", "urls:repeated"]
    assert len(rows) == 2  # two of three share URL and fate
    assert raw_markers(DataDir(tmp_path / "data"))[0].fates == {"fetched": 2}
    assert books(DataDir(tmp_path / "data"), "list").fates == {"to_fetch": 2, "urls:repeated": 1}


def test_names_and_captions_that_are_no_text(tmp_path: Path, source: Path) -> None:
    (source / os.fsdecode(b"caf\xe9.jpg")).write_bytes(picture_bytes(1))
    (source / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"na\xefve \0 caption")
    put(source, "ü ?#%.jpg", picture_bytes(2))
    put(source, "ü ?#%.json", '{"caption": "lone \\ud800", "x": "\\udc00"}')
    put(source, "bad.jpg", picture_bytes(3))
    put(source, "bad.json", "{not json")
    rows = ingest(tmp_path, source)
    assert {url: row["caption"] for url, row in rows.items()} == {
        "caf\\xe9.jpg": "na\ufffdve \ufffd caption", "ü ?#%.jpg": "lone \ufffd", "bad.jpg": None
    }  # fmt: skip
    assert {row["status"] for row in rows.values()} == {"success"}


def test_hostile_tars(tmp_path: Path, source: Path) -> None:
    with tarfile.open(source / "evil.tar", "w") as tar:
        for name, link in (("../../up.jpg", None), ("/abs.jpg", None), ("link.jpg", "/etc/passwd"), ("a.pyd", None)):
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
            body = b"" if link else picture_bytes(len(name))
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    rows = ingest(tmp_path, source)
    assert set(rows) == {"evil.tar/../../up.jpg", "evil.tar//abs.jpg"}
    assert not list(tmp_path.parent.glob("up.jpg"))


def refusal(tmp_path: Path, source: str | Path, **settings: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        run(IngestConfig(source=str(source), **settings), DataDir(tmp_path / "refused"))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    assert refusal(tmp_path, source).code == MISSING
    assert refusal(tmp_path, source / "gone").code == MISSING
    assert refusal(tmp_path, f"{source}/*.tar").code == MISSING
    put(source, "list.csv", "url\n")
    assert "curate download" in (refusal(tmp_path, source / "list.csv").hint or "")
    put(source, "1.jpg", picture_bytes(1))
    assert refusal(tmp_path, source, captions=str(source / "no.csv")).code == MISSING
    put(source, "strange.csv", "a,b\n1,2\n")
    assert "`a`, `b`" in refusal(tmp_path, source, captions=str(source / "strange.csv")).message
    put(source, "other.csv", "path,caption\nelsewhere.jpg,x\n")
    assert "elsewhere.jpg" in refusal(tmp_path, source, captions=str(source / "other.csv")).message
    tar_of(source / "x.tar", {"1.jpg": picture_bytes(1)})
    assert "both loose pictures and tars" in refusal(tmp_path, source).message


def test_damaged_tars_are_named(tmp_path: Path, source: Path) -> None:
    path = tar_of(source / "x.tar", {"1.jpg": picture_bytes(1), "2.jpg": picture_bytes(2)})
    path.write_bytes(path.read_bytes()[:-4000])
    assert "x.tar is damaged" in refusal(tmp_path, source).message
    path.write_bytes(b"")
    put(source, "x.parquet", b"")
    error = refusal(tmp_path, source)
    assert (error.code, "x.parquet" in error.message) == (USAGE, True)


def _png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def _png_of(size: tuple[int, int]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()
