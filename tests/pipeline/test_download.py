"""A real list, a real server, real img2dataset: what is stored, what is refused, and that a re-run changes nothing."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import books, download
from pipeline.base import HeadraceError
from pipeline.download import DownloadConfig
from pipeline.fetch import FetchConfig
from pipeline.resize import ImageConfig
from pipeline.shards import DataDir, read_parquet, read_tar, shard_files
from tests.pipeline.factory import jpeg, picture


class Web(ThreadingHTTPServer):
    """Serves /N.jpg by number and some trouble; all else is 404. `asked` counts requests by path."""

    asked: Counter[str]


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        name = self.path.strip("/").split(".")[0]
        if name.isdigit():
            return self.answer(200, jpeg(picture(int(name), 300), 80))
        if name == "tilted":
            out = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.new("RGB", (40, 20), "red").save(out, "JPEG", exif=exif)
            return self.answer(200, out.getvalue())
        if name == "html":
            return self.answer(200, b"<html>not a picture</html>")
        return self.answer(503 if name == "busy" else 404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web(("127.0.0.1", 0), Handler)
    server.asked = Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def settings(web: Web, urls: Path, **values: Any) -> DownloadConfig:
    fetch = FetchConfig(connect={"*.test": f"127.0.0.1:{web.server_port}"}, retries=0, per_host_rate=1000)
    values = {"shard_size": 8, "image": ImageConfig(image_size=128), "fetch": fetch} | values
    return DownloadConfig(urls=str(urls), **values)


def write_list(path: Path, names: list[str], **columns: list[Any]) -> Path:
    urls = [name if "://" in name else f"http://host{i % 3}.test/{name}" for i, name in enumerate(names)]
    table = pa.table({"url": urls, "caption": [f"caption {i}" for i in range(len(urls))], **columns})
    pq.write_table(table, path)
    return path


NAMES = [f"{i}.jpg" for i in range(10)] + ["none.jpg", "html.jpg", "tilted.jpg", "ftp://a.test/1.jpg"]


def test_every_row_has_a_fate_and_every_column_survives(tmp_path: Path, web: Web) -> None:
    when = [datetime(2026, 1, 1)] * len(NAMES)
    urls = write_list(tmp_path / "l.parquet", NAMES, width=[[1, 2]] * len(NAMES), when=when)
    data = DataDir(tmp_path / "d")
    summary = download.run(settings(web, urls), data)
    assert summary.rows == 13
    assert summary.fates == {"fetched": 11, "fetch:http_404": 1, "image:not_an_image": 1}
    assert books.books(data, "list").fates == {"to_fetch": 13, "urls:scheme": 1}

    kept = pa.concat_tables(read_parquet(path) for path in shard_files(data.urls, "parquet"))
    assert kept.num_rows == 14 and kept["uid"].to_pylist() == sorted(kept["uid"].to_pylist())
    assert kept["when"].to_pylist() == when and kept["width"].to_pylist() == [[1, 2]] * 14

    raw = [row for path in shard_files(data.raw, "parquet") for row in read_parquet(path).to_pylist()]
    samples = {sample.key: sample.files for path in shard_files(data.raw, "tar") for sample in read_tar(path)}
    assert [row["key"] for row in raw] == sorted(row["key"] for row in raw)
    assert {row["key"] for row in raw if row["status"] == "success"} == set(samples)
    for row in raw:
        assert row["uid"] == sha256(f"{row['url']}\n{row['caption']}".encode()).hexdigest()[:32]
        if row["status"] == "success":
            files = samples[row["key"]]
            assert Image.open(io.BytesIO(files["jpg"])).size == (row["width"], row["height"])
            assert files["txt"].decode() == row["caption"]
            assert json.loads(files["json"])["sha256"] == row["sha256"]
    tilted = next(row for row in raw if row["url"].endswith("tilted.jpg"))
    assert (tilted["original_width"], tilted["original_height"]) == (20, 40)
    plain = next(row for row in raw if row["url"].endswith("/3.jpg"))
    assert (plain["width"], plain["original_width"]) == (128, 300)
    assert plain["sha256"] == sha256(jpeg(picture(3, 300), 80)).hexdigest()


def test_a_second_run_asks_for_nothing_and_workers_do_not_change_bytes(tmp_path: Path, web: Web) -> None:
    urls = write_list(tmp_path / "l.parquet", NAMES)
    contents = []
    for workers in (1, 2):
        data = DataDir(tmp_path / str(workers))
        download.run(settings(web, urls), data, workers)
        files = [*shard_files(data.raw, "tar"), *shard_files(data.raw, "parquet"), *shard_files(data.urls, "parquet")]
        contents.append({str(path.relative_to(data.root)): path.read_bytes() for path in files})
        web.asked.clear()
        assert download.finished(settings(web, urls), data)
        assert download.run(settings(web, urls), data, workers).done == 0
        assert not web.asked
    assert contents[0] == contents[1]


def test_a_lost_shard_is_fetched_anew_and_is_the_same(tmp_path: Path, web: Web) -> None:
    urls, data = write_list(tmp_path / "l.parquet", NAMES), DataDir(tmp_path / "d")
    download.run(settings(web, urls), data)
    path = data.raw / "00001.tar"
    before = path.read_bytes()
    path.unlink()
    assert not download.finished(settings(web, urls), data)
    assert download.run(settings(web, urls), data).done == 1
    assert path.read_bytes() == before


def test_another_list_or_other_pictures_are_refused(tmp_path: Path, web: Web) -> None:
    urls, data = write_list(tmp_path / "l.parquet", NAMES), DataDir(tmp_path / "d")
    download.run(settings(web, urls), data)
    with pytest.raises(HeadraceError, match=r"other settings \(image of `download`\)") as caught:
        download.run(settings(web, urls, image=ImageConfig(image_size=64)), data)
    assert caught.value.code == 4
    other = write_list(tmp_path / "o.parquet", NAMES[:5])
    with pytest.raises(HeadraceError, match=r"another list or with other settings \(list"):
        download.run(settings(web, other), data)
    download.forget(data)
    assert download.run(settings(web, other), data).rows == 5


def test_retry_appends_only_what_can_succeed(tmp_path: Path, web: Web) -> None:
    urls, data = write_list(tmp_path / "l.parquet", ["1.jpg", "none.jpg", "busy.jpg"]), DataDir(tmp_path / "d")
    before = download.run(settings(web, urls), data)
    assert before.fates == {"fetched": 1, "fetch:http_404": 1, "fetch:http_503": 1}
    web.asked.clear()
    download.run(settings(web, urls), data, retry_failed=True)
    assert {path for path in web.asked if "robots" not in path and "well-known" not in path} == {"/busy.jpg"}
    again = read_parquet(data.raw / "00001.parquet").to_pylist()
    assert [row["url"].rpartition("/")[2] for row in again] == ["busy.jpg"]
    assert download.run(settings(web, urls), data).done == 0


def test_a_retry_before_the_download_ended_finishes_it_first(tmp_path: Path, web: Web) -> None:
    """Its new shards get numbers that no shard of the list has: every row keeps one fate."""
    names = [f"{i}.jpg" for i in range(14)] + ["busy.jpg", "busy.jpg?2"]
    urls, data = write_list(tmp_path / "l.parquet", names), DataDir(tmp_path / "d")
    download.run(settings(web, urls), data)
    for path in (data.markers / "download" / "00001.json", data.raw / "00001.tar", data.raw / "00001.parquet"):
        path.unlink()
    download.run(settings(web, urls), data, retry_failed=True)
    rows = {path.stem: read_parquet(path).num_rows for path in shard_files(data.raw, "parquet")}
    assert rows == {"00000": 8, "00001": 8, "00002": 2}
    assert books.books(data, "download").rows == 18


def test_no_list_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="no list of URLs"):
        download.run(DownloadConfig(), DataDir(tmp_path / "d"))
