"""Stage `ingest`: pictures already on disk → `urls/` and `raw/`, as `download` would have left them.

Rows get the path as their URL, unless the source names one, and are ordered by uid. It does not know the forms of
sources (`sources`), nor how a picture is checked (`images`) and stored (`resize`).
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import MISSING, Config, HeadraceError, atomic_path, write_json
from pipeline.books import Summary, read_markers
from pipeline.engine import Part, Shard, run_stage
from pipeline.resize import ImageConfig
from pipeline.shards import DataDir, TarWriter, canonical_json, read_parquet, rows_to_fetch, source_name, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.images import ImageSandbox
    from pipeline.intake.entries import Entry
    from pipeline.intake.sources import Chunk, Source
    from pipeline.intake.spool import Rows

NAME_WIDTH = 5  # digits of a shard's name, img2dataset's `oom_shard_count`
# Reasons of an earlier run that speak of a picture's bytes; any other is about getting hold of them.
IMAGE_CODES = frozenset(
    {"empty", "not_an_image", "corrupt", "too_many_pixels", "aspect", "memory", "crashed", "resize"}
)
PROVENANCE = ("source_file", "source_offset", "source_length", "source_error")


class IngestConfig(Config):
    """What `curate ingest` can be told."""

    source: str | None = Field(None, description="a folder of pictures, a tar or a glob of tars, an img2dataset output")
    captions: str | None = Field(None, description="a table of captions: a column of paths, one of captions")
    shard_size: int = Field(1000, ge=1, le=100_000, description="rows of a raw shard")
    max_bytes: int = Field(50_000_000, gt=0, description="bytes of a picture; a larger one is not read")
    image: ImageConfig = ImageConfig()

    def byte_settings(self) -> dict[str, Any]:
        """The settings that change bytes: what a folder was ingested with, and refuses to mix."""
        return {"shard_size": self.shard_size, "max_bytes": self.max_bytes, "image": self.image.model_dump()}


def run(config: IngestConfig, data: DataDir, workers: int = 1) -> Summary:
    """Write every picture of the source to `urls/`, then to `raw/`, checked and resized as `download` does.

    Another source, or settings that change bytes, are refused (exit code 4).
    """
    from pipeline.intake.sources import open_source

    if config.source is None:
        raise HeadraceError("no source is named", hint="name one: `curate ingest SOURCE`, or `source` in the recipe")
    source = open_source(config.source, config.captions)
    _write_list(source, config.shard_size, data)
    stages = {"ingest": config.byte_settings()}
    process = _IngestShard(data, config, source.root)
    return run_stage(data, stages, process, _shards(data), workers=workers, refuse_change=True)


def _write_list(source: Source, shard_size: int, data: DataDir) -> None:
    from pipeline.intake.spool import write_shards

    def write(shard: Shard) -> dict[str, Part]:
        rows = (_rows(chunk, names) for chunk in source.chunks())
        written = write_shards(rows, data, shard_size, source.expected_bytes)
        if not written:
            raise HeadraceError(f"{source.root} holds no pictures", hint="name the folder that does", code=MISSING)
        fates = sum((Counter(part.fates) for part in written), Counter[str]())
        return {"list": Part(fates, tuple(f"urls/{part.name}.parquet" for part in written))}

    names: dict[str, str] = {}
    settings = {"source": source.fingerprint(), "shard_size": shard_size}
    run_stage(data, {"list": settings}, write, [Shard("all", None)], refuse_change=True)


def _shards(data: DataDir) -> list[Shard]:
    files = sorted(read_markers(data, "list")["all"].outputs)
    return [Shard(Path(name).stem, len(rows_to_fetch(data.root / name, ["uid"])), (name,)) for name in files]


# --- pictures as rows of the list --------------------------------------------------------------------


def _rows(chunk: Chunk, names: dict[str, str]) -> Rows:
    """Entries and their table's rows as a batch for `urls/`; the source's own URL and uid stand where it has them."""
    import pyarrow as pa

    from pipeline.intake.coltypes import valid_text
    from pipeline.intake.lists import own_columns, uids, without_nul
    from pipeline.intake.rowfiles import Batch
    from pipeline.intake.spool import Rows

    table, entries = chunk
    columns = _told(table, entries)
    paths = pa.array([_utf8(entry.path) for entry in entries], pa.string())
    url, url_col = _own_urls(columns, paths)
    caption = without_nul(valid_text(pa.array([_utf8(entry.caption) for entry in entries], pa.string())))
    uid, uid_col = uids(url, caption, columns)
    columns |= _provenance(entries, columns)
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    absorbed = {url_col, uid_col, "caption"}
    own, types = own_columns(Batch(batch, batch.schema, pa.repeat(False, len(batch))), names, absorbed)
    return Rows(uid, url, caption, pa.nulls(len(entries), pa.string()), own, types)


def _told(table: pa.Table | None, entries: list[Entry]) -> dict[str, pa.Array]:
    """The columns that a table or JSON beside the pictures brings, row by row."""
    import pyarrow as pa

    from pipeline.intake.coltypes import plain
    from pipeline.intake.rowfiles import object_batch

    columns: dict[str, pa.Array] = {}
    if table is not None:
        taken = table.take(pa.array([entry.row for entry in entries], pa.int64())).combine_chunks()
        columns = {name: plain(taken[name].combine_chunks()) for name in taken.column_names}
    if any(entry.extra for entry in entries):
        said = object_batch([entry.extra for entry in entries]).rows
        columns |= {name: said.column(name) for name in said.schema.names if name not in columns}
    return {source_name(name, PROVENANCE): column for name, column in columns.items()}


def _provenance(entries: list[Entry], taken: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Where each picture lies; all captions of those with several, and why one has no bytes, if any has."""
    import pyarrow as pa

    from pipeline.intake.coltypes import clean

    columns = {
        "source_file": pa.array([_utf8(entry.file) for entry in entries], pa.string()),
        "source_offset": pa.array([entry.offset for entry in entries], pa.int64()),
        "source_length": pa.array([entry.length for entry in entries], pa.int64()),
        "source_error": pa.array([_utf8(entry.error) for entry in entries], pa.string()),
    }
    if any(entry.captions for entry in entries) and "captions" not in taken:
        captions = [entry.captions and [clean(text) for text in entry.captions] for entry in entries]
        columns["captions"] = pa.array(captions, pa.list_(pa.string()))
    return columns


def _utf8(text: str | None) -> str | None:
    """Text that UTF-8 can hold: JSON may bring lone surrogates."""
    from pipeline.intake.coltypes import clean

    return text if text is None or text.isascii() else clean(text)


def _own_urls(columns: dict[str, pa.Array], paths: pa.Array) -> tuple[pa.Array, str | None]:
    """The source's own http(s) URLs, paths elsewhere; and the column's name where every row's URL is from it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    name = next((name for name in columns if name.lower() == "url"), None)
    if name is None or not pa.types.is_string(columns[name].type):
        return paths, None
    given = pc.fill_null(pc.match_substring_regex(columns[name], "^https?://"), False)
    return pc.if_else(given, columns[name], paths), name if pc.all(given).as_py() else None


# --- one shard ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _IngestShard:
    """Read, check, resize and write the pictures of one shard."""

    data: DataDir
    config: IngestConfig
    root: Path

    def __call__(self, shard: Shard) -> dict[str, Part]:
        started = time.time()
        table = read_parquet(self.data.root / shard.inputs[0])
        rows = table.filter(table["fate"].is_null())
        records = self._write_tar(shard.name, rows)
        write_parquet(_raw_table(records), self.data.raw / f"{shard.name}.parquet")
        write_json(self.data.raw / f"{shard.name}_stats.json", _stats(records, started))
        outputs = (f"raw/{shard.name}.tar", f"raw/{shard.name}.parquet")
        return {"ingest": Part(Counter(map(_fate, records)), outputs)}

    def _write_tar(self, name: str, rows: pa.Table) -> list[dict[str, Any]]:
        records = []
        columns = ["uid", "url", "caption", *PROVENANCE]
        with atomic_path(self.data.raw / f"{name}.tar") as path, path.open("wb") as file:
            tar = TarWriter(file)
            for number, row in enumerate(rows.select(columns).to_pylist()):
                key = sample_key(int(name), number, self.config.shard_size)
                record, picture = self._stored(key, row)
                records.append(record)
                if picture is not None:
                    tar.add(f"{key}.{ImageConfig.encode_format}", picture)
                    tar.add(f"{key}.txt", (row["caption"] or "").encode())
                    tar.add(f"{key}.json", canonical_json(record))
            tar.close()
        return records

    def _stored(self, key: str, row: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """A row of the raw table, and the picture as it is stored."""
        from pipeline.resize import encode

        record: dict[str, Any] = dict.fromkeys(name for name, _ in _raw_fields())
        record |= {"uid": row["uid"], "url": row["url"], "caption": row["caption"], "key": key}
        if (error := row["source_error"]) is not None:
            status = "failed_to_resize" if _code(error) in IMAGE_CODES else "failed_to_download"
            return record | {"status": status, "error_message": error}, None
        body, error = self._read(row)
        if body is None:
            return record | {"status": "failed_to_download", "error_message": error}, None
        record |= {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        seen = _sandbox(self.config.image, self.config.max_bytes).normalise(body)
        picture, width, height, source_width, source_height, error = encode(
            _resizer(self.config.image), self.config.image, body, seen
        )
        if picture is None:
            return record | {"status": "failed_to_resize", "error_message": error}, None
        sizes = {"width": width, "height": height, "original_width": source_width, "original_height": source_height}
        return record | sizes | {"status": "success", "format": seen.format}, picture

    def _read(self, row: dict[str, Any]) -> tuple[bytes | None, str | None]:
        from pipeline.intake.entries import open_file

        try:
            with open_file(self.root, row["source_file"]) as file:
                file.seek(row["source_offset"] or 0)
                wanted = self.config.max_bytes + 1 if row["source_length"] is None else row["source_length"]
                body = file.read(min(wanted, self.config.max_bytes + 1))
        except OSError as error:
            return None, f"unreadable: {error.strerror}"
        if len(body) > self.config.max_bytes:
            return None, f"too_large: more than {self.config.max_bytes:,} bytes"
        return body, None


def sample_key(shard: int, row: int, shard_size: int) -> str:
    """img2dataset's key: 10^w shard + row, w the digits that a row of the shard can need, five more in all."""
    width = math.ceil(math.log10(shard_size))
    return f"{10**width * shard + row:0{width + NAME_WIDTH}d}"


@functools.lru_cache(maxsize=1)
def _sandbox(image: ImageConfig, max_bytes: int) -> ImageSandbox:
    from pipeline.images import ImageSandbox
    from pipeline.resize import limits

    return ImageSandbox(limits(image, max_bytes))


@functools.lru_cache(maxsize=1)
def _resizer(image: ImageConfig) -> Any:
    from pipeline.resize import resizer

    return resizer(image)


def _code(error: str | None) -> str:
    return (error or "").partition(":")[0]


def _fate(record: dict[str, Any]) -> str:
    if record["status"] == "success":
        return "fetched"
    stage = "image" if record["status"] == "failed_to_resize" else "fetch"
    return f"{stage}:{_code(record['error_message'])}"


def _raw_fields() -> list[tuple[str, str]]:
    text = ("uid", "url", "caption", "key", "status", "error_message")
    numbers = ("width", "height", "original_width", "original_height")
    return [*((n, "string") for n in text), *((n, "int32") for n in numbers), ("sha256", "string"), *_MORE]


_MORE = (("format", "string"), ("bytes", "int64"))


def _raw_table(records: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(records, pa.schema(_raw_fields()))


def _stats(records: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """img2dataset's statistics of a shard; they hold times, so they stay outside every hash."""
    status = Counter(record["status"] for record in records)
    return {
        "count": len(records),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "start_time": started,
        "end_time": time.time(),
        "duration": time.time() - started,
        "status_dict": dict(Counter(record["error_message"] or "success" for record in records)),
    }
