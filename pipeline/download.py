"""Stage `download`: a list of URLs → `urls/` and `raw/`, by img2dataset's own downloader, resizer and writer.

The engine owns processes, resume and failure. Of img2dataset, the downloader runs in-process per shard with our fetch
in place of its `download_image_with_retry`, its resizer sees only what a sandboxed child has decoded, and its writer
is subclassed for key order and a fixed time. This module does not know how a URL is fetched or a picture checked.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import Config, HeadraceError, sync_directory
from pipeline.books import Summary, raw_markers, read_markers, recorded_outputs, stale_files
from pipeline.engine import Part, Shard, run_stage
from pipeline.fetch import FetchConfig
from pipeline.resize import ImageConfig
from pipeline.resize import limits as picture_limits
from pipeline.shards import DataDir, raw_fate, read_parquet, rows_to_fetch, shard_name, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.fetch.client import Client, Fetched
    from pipeline.images import ImageSandbox, Normalised

NAME_WIDTH = 5  # digits of a shard's name, img2dataset's `oom_shard_count`


class DownloadConfig(Config):
    """What `curate download` can be told."""

    urls: str | None = Field(None, description="the list of URLs: a path or a glob of .parquet .csv .tsv .json(l) .txt")
    url_col: str | None = Field(None, description="the list's column of URLs; found by its usual names if not given")
    caption_col: str | None = Field(None, description="the list's column of captions; found likewise")
    shard_size: int = Field(1000, ge=1, le=100_000, description="rows of a raw shard")
    threads: int = Field(32, ge=1, le=512, description="URLs under way at once in each worker")
    image: ImageConfig = ImageConfig()
    fetch: FetchConfig = FetchConfig()

    def byte_settings(self) -> dict[str, Any]:
        """The settings that change bytes: what a folder was downloaded with, and refuses to mix."""
        polite = self.fetch.model_dump(include={"robots", "opt_out", "max_bytes", "user_agent"})
        return {"shard_size": self.shard_size, "image": self.image.model_dump(), "fetch": polite}


def run(config: DownloadConfig, data: DataDir, workers: int = 1, *, retry_failed: bool = False) -> Summary:
    """Write the list to `urls/`, fetch every row that has no fate yet into `raw/`.

    With `retry_failed` the rows whose last fetch failed in a way that can still succeed go into new raw shards.
    Another list, or settings that change bytes, are refused (exit code 4).
    """
    _write_list(config, data)
    process, stages = _DownloadShard(data, config), {"download": config.byte_settings()}
    summary = run_stage(data, stages, process, _shards(data), workers=workers, refuse_change=True)
    if retry_failed:  # numbers after the last shard are free only when all shards are done
        _plan_retry(config, data)
        summary = run_stage(data, stages, process, _shards(data), workers=workers, refuse_change=True)
    return summary


def finished(config: DownloadConfig, data: DataDir) -> bool:
    """Whether every shard of the folder's list holds, so that a run would fetch nothing."""
    markers, listed = read_markers(data, "download"), read_markers(data, "list").get("all")
    recorded = recorded_outputs(data)
    if listed is None or stale_files(data, listed, recorded):
        return False
    shards = [shard.name for shard in _shards(data)]
    return all(name in markers and not stale_files(data, markers[name], recorded) for name in shards)


def forget(data: DataDir) -> None:
    """`--redo`: remove what an earlier list or source left in the folder, markers first."""
    for stage in ("download", "ingest", "list", "retry"):
        shutil.rmtree(data.markers / stage, ignore_errors=True)
    for folder in (data.urls, data.raw, data.root / ".retry", data.root / "miniweb"):
        shutil.rmtree(folder, ignore_errors=True)


# --- the list ----------------------------------------------------------------------------------------


def _write_list(config: DownloadConfig, data: DataDir) -> None:
    from pipeline.intake import lists

    if config.urls is None:
        raise HeadraceError("no list of URLs is named", hint="name one: `curate download URLS`, or --urls FILE")
    source = lists.open_list(config.urls, config.url_col, config.caption_col)
    settings = {
        "list": source.fingerprint(),
        "url_col": source.url_col,
        "caption_col": source.caption_col,
        "shard_size": config.shard_size,
    }

    def write(_: Shard) -> dict[str, Part]:
        written = lists.write_urls(source, data, config.shard_size)
        fates = sum((Counter(part.fates) for part in written), Counter[str]())
        return {"list": Part(fates, tuple(f"urls/{part.name}.parquet" for part in written))}

    run_stage(data, {"list": settings}, write, [Shard("all", None)], refuse_change=True)


def _shards(data: DataDir) -> list[Shard]:
    """One raw shard per shard of `urls/` and per planned retry."""
    files = sorted(read_markers(data, "list")["all"].outputs)
    retries = [path for marker in read_markers(data, "retry").values() for path in marker.outputs]
    return [Shard(Path(p).stem, len(rows_to_fetch(data.root / p, ["uid"])), (p,)) for p in [*files, *retries]]


def _plan_retry(config: DownloadConfig, data: DataDir) -> None:
    """Write the rows worth another fetch to `.retry/`, in shards numbered after the last raw shard."""
    import pyarrow as pa

    from pipeline.fetch.client import retryable

    latest: dict[str, dict[str, Any]] = {}
    markers = raw_markers(data)
    for marker in markers:
        table = read_parquet(data.raw / f"{marker.shard}.parquet", ["uid", "url", "caption", "status", "error_message"])
        latest |= {row["uid"]: row for row in table.to_pylist()}
    rows = [row for row in latest.values() if row["status"] != "success" and retryable(row["error_message"] or "")]
    first = int(markers[-1].shard) + 1
    chunks = [rows[i : i + config.shard_size] for i in range(0, len(rows), config.shard_size)]
    schema = pa.schema([(name, pa.string()) for name in ("uid", "url", "caption", "fate")])

    def write(shard: Shard) -> dict[str, Part]:
        path = f".retry/{shard.name}.parquet"
        if int(shard.name) < first:  # an earlier retry, whose rows have got a later fate since
            raise HeadraceError(f"{data.root / path} is missing or was changed", hint="start again with --redo")
        write_parquet(pa.Table.from_pylist(chunks[int(shard.name) - first], schema), data.root / path)
        return {"retry": Part({"again": shard.rows or 0}, (path,))}

    before = [Shard(marker.shard, marker.rows) for marker in read_markers(data, "retry").values()]
    planned = [Shard(shard_name(first + i), len(chunk)) for i, chunk in enumerate(chunks)]
    run_stage(data, {"retry": {}}, write, [*before, *planned])


# --- one shard ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DownloadShard:
    """Fetch the rows of one shard and write its tar, table and img2dataset statistics."""

    data: DataDir
    config: DownloadConfig

    def __call__(self, shard: Shard) -> dict[str, Part]:
        rows = rows_to_fetch(self.data.root / shard.inputs[0], ["uid", "url", "caption"])
        folder = self.data.raw / f".{shard.name}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._download(int(shard.name), rows, folder)
        fates = _fates(folder / f"{shard.name}.parquet")
        outputs = _publish(folder, self.data.raw, shard.name)
        return {"download": Part(fates, outputs)}

    def _download(self, index: int, rows: pa.Table, folder: Path) -> None:
        """Fetch `rows` and let img2dataset write the shard in `folder`."""
        from pipeline.fetch.client import Client
        from pipeline.images import ImageSandbox

        feather = folder / "rows.feather"
        _write_feather(rows, feather)
        client = Client(self.config.fetch, self.data.root / ".limits")
        limits = picture_limits(self.config.image, self.config.fetch.max_bytes)
        with contextlib.closing(client), ImageSandbox(limits) as sandbox:
            self._download_by(_Fetch(client, sandbox), (index, str(feather)), rows.column_names, str(folder))

    def _download_by(self, fetch: _Fetch, shard: tuple[int, str], columns: list[str], folder: str) -> None:
        resize = _Resize(self.config.image)
        from img2dataset import downloader

        writer = functools.partial(_writer_class(), learned=fetch.learned, size=self.config.shard_size)
        download = downloader.Downloader(
            sample_writer_class=writer,
            resizer=resize,
            thread_count=self.config.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=folder,
            column_list=columns,
            timeout=None,
            number_sample_per_shard=self.config.shard_size,
            oom_shard_count=NAME_WIDTH,
            compute_hash=None,
            verify_hash_type=None,
            encode_format=self.config.image.encode_format,
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        with _fetching_by(downloader, fetch):
            download.download_shard(shard)


def _write_feather(rows: pa.Table, path: Path) -> None:
    """The form in which img2dataset's downloader takes its rows."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)


@contextlib.contextmanager
def _fetching_by(downloader: Any, fetch: _Fetch) -> Iterator[None]:
    """Put our fetch in the place of img2dataset's, whose own opens any scheme and reads without bound."""
    theirs = downloader.download_image_with_retry
    downloader.download_image_with_retry = fetch
    try:
        yield
    finally:
        downloader.download_image_with_retry = theirs


class _Picture(io.BytesIO):
    """What the sandbox made of a body: img2dataset's resizer reads the safe bytes from it."""

    def __init__(self, body: bytes, seen: Normalised) -> None:
        super().__init__(seen.data or b"")
        self.body, self.seen = body, seen


class _Fetch:
    """Stands in for `download_image_with_retry`; keeps what the fetch learned, by row number."""

    def __init__(self, client: Client, sandbox: ImageSandbox) -> None:
        self.client, self.sandbox = client, sandbox
        self.learned: dict[int, dict[str, Any]] = {}

    def __call__(self, row: tuple[int, str], **_: Any) -> tuple[int, _Picture | None, str | None]:
        number, url = row
        fetched = self.client.fetch(url)
        seen = None if fetched.body is None else self.sandbox.normalise(fetched.body)
        self.learned[number] = _learned(fetched, seen)
        if fetched.body is None or seen is None:
            return number, None, fetched.error
        return number, _Picture(fetched.body, seen), None


class _Resize:
    """img2dataset's resizer, for pictures that the sandbox accepted; a JPEG that needs no change is kept as it is."""

    def __init__(self, config: ImageConfig) -> None:
        from pipeline.resize import resizer

        self.config, self.resizer = config, resizer(config)

    def __call__(self, picture: _Picture, boxes: None) -> tuple[bytes | None, Any, Any, Any, Any, str | None]:
        from pipeline.resize import encode

        return encode(self.resizer, self.config, picture.body, picture.seen)


LEARNED = ("sha256", "http_status", "final_url", "content_type", "opt_out", "format", "bytes")


@functools.cache
def _writer_class() -> type:
    """img2dataset's WebDataset writer, with rows in key order, a fixed time, and what the fetch learned."""
    import pyarrow as pa
    import webdataset
    from img2dataset.writer import WebDatasetSampleWriter

    types = {"http_status": pa.int32(), "bytes": pa.int64()}

    class OrderedWriter(WebDatasetSampleWriter):  # type: ignore[misc]
        def __init__(self, *args: Any, learned: dict[int, dict[str, Any]], size: int) -> None:
            shard_id, folder, save_caption, digits, schema, encode_format = args
            for name in LEARNED:
                schema = schema.append(pa.field(name, types.get(name, pa.string())))
            super().__init__(shard_id, folder, save_caption, digits, schema, encode_format)
            self.tarwriter: Any = self.tarwriter
            self.tarwriter.close()
            self.tar_fd.seek(0)
            self.tar_fd.truncate()
            self.tarwriter = webdataset.TarWriter(self.tar_fd, mtime=0)
            self.learned, self.first = learned, shard_id * 10 ** math.ceil(math.log10(size))
            self.rows: list[tuple[str, bytes | None, str | None, dict[str, Any]]] = []

        def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
            self.rows.append((key, img_str, caption, meta | self.learned.pop(int(key) - self.first)))

        def close(self) -> None:
            for key, img_str, caption, meta in sorted(self.rows, key=lambda row: row[0]):
                super().write(img_str, key, caption, meta)
            super().close()

    return OrderedWriter


def _learned(fetched: Fetched, seen: Normalised | None) -> dict[str, Any]:
    return {
        "sha256": fetched.sha256,
        "http_status": fetched.status,
        "final_url": fetched.final_url,
        "content_type": fetched.content_type,
        "opt_out": fetched.opt_out,
        "format": seen.format if seen else None,
        "bytes": None if fetched.body is None else len(fetched.body),
    }


def _fates(path: Path) -> Counter[str]:
    """How many rows of a raw table were fetched, and how many not, by reason."""
    table = read_parquet(path, ["status", "error_message"])
    return Counter(raw_fate(*row) or "fetched" for row in zip(*(c.to_pylist() for c in table.columns), strict=True))


def _publish(folder: Path, raw: Path, name: str) -> tuple[str, ...]:
    """Flush a finished shard's files and move them into `raw/`; img2dataset's statistics go along, unrecorded."""
    for path in sorted(folder.glob(f"{name}*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(raw / path.name)
    folder.rmdir()
    sync_directory(raw)
    return f"raw/{name}.tar", f"raw/{name}.parquet"
