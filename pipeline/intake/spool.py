"""Order any number of rows by uid in bounded memory: rows go into buckets by their uid's first bits, on disk, and each
bucket is sorted by itself. Uids are hashes, so buckets are even.

On the way out a repeated uid gets its fate, and columns whose type differed from batch to batch their common one.
It does not know where rows come from or what becomes of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.intake.coltypes import common_type, with_columns
from pipeline.intake.rowfiles import BATCH_BYTES, BATCH_ROWS
from pipeline.shards import DataDir, shard_files, shard_name, source_name, write_parquet

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 256
REPEATED, TO_FETCH = "urls:repeated", "to_fetch"
OURS = ("uid", "url", "caption", "fate")


class UrlShard(NamedTuple):
    """A written shard of `urls/`: its rows, how many go to the fetch, and all by fate (`to_fetch` where none)."""

    name: str
    rows: int
    to_fetch: int
    fates: Mapping[str, int]


class Rows(NamedTuple):
    """A batch on its way in: uid of shape (rows, 16) uint8; url, caption and fate text; the input's own columns.

    `types` are what the columns' values could be; no column is named as one of ours, whatever its case.
    """

    uid: np.ndarray[Any, np.dtype[np.uint8]]
    url: pa.Array
    caption: pa.Array
    fate: pa.Array
    columns: pa.RecordBatch
    types: pa.Schema


def uid_bytes(url: pa.Array, caption: pa.Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first half of sha256 over url, a newline and caption (nulls as empty): shape (rows, 16), uint8."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    text = [pc.fill_null(column, "").cast(pa.large_string()) for column in (url, caption)]
    joined = pc.binary_join_element_wise(*text, pa.scalar("\n", pa.large_string()))
    offsets = np.frombuffer(joined.buffers()[1], np.int64)[joined.offset : joined.offset + len(joined) + 1].tolist()
    data = memoryview(joined.buffers()[2] or b"")
    sha256 = hashlib.sha256
    parts = [sha256(data[a:b]).digest()[:16] for a, b in itertools.pairwise(offsets)]
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 16)


def write_shards(batches: Iterator[Rows], data: DataDir, shard_size: int, expected_bytes: int) -> list[UrlShard]:
    """Write all rows to `urls/`, ordered by uid (equal ones by input order), `shard_size` to a file.

    A uid met before among the rows that go to the fetch is `urls:repeated`. `expected_bytes` is about how much text
    will come. Columns: uid, url, caption, fate, `row` (the input's row number), then the input's own.
    """
    with _temporary(data.root) as folder:
        spool = _Spool(folder, min(max(expected_bytes // BUCKET_BYTES, 1), MAX_BUCKETS))
        for rows in batches:
            spool.add(rows)
        spool.flush()
        written = [_write(data, i, table) for i, table in enumerate(_regrouped(spool.buckets(), shard_size))]
    names = {shard.name for shard in written}
    for path in shard_files(data.urls, "parquet"):
        if path.stem not in names:  # of a list that was given up before it was whole
            path.unlink()
    return written


def _write(data: DataDir, index: int, table: pa.Table) -> UrlShard:
    name = shard_name(index)
    write_parquet(table.combine_chunks(), data.urls / f"{name}.parquet")
    fates = Counter(fate or TO_FETCH for fate in table["fate"].to_pylist())
    return UrlShard(name, len(table), fates[TO_FETCH], dict(sorted(fates.items())))


@contextlib.contextmanager
def _temporary(root: Path) -> Iterator[Path]:
    """A folder that goes when we go; one left by a killed run is swept away by the next run's lock."""
    folder = root / f".spool.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _regrouped(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows; the last may be smaller."""
    import pyarrow as pa

    rest: list[pa.Table] = []
    rows = 0
    for table in tables:
        rest, rows = [*rest, table], rows + len(table)
        if rows >= size:
            whole, at = pa.concat_tables(rest), 0
            while rows - at >= size:
                yield whole.slice(at, size)
                at += size
            rest, rows = [whole.slice(at)], rows - at
    if rows:
        yield pa.concat_tables(rest)


class _Spool:
    """The buckets on disk: each a file of Arrow streams, one after another, whose schemas may differ."""

    def __init__(self, folder: Path, buckets: int) -> None:
        self.folder, self.count = folder, buckets
        self.types: dict[str, pa.DataType] = {}
        self.pending: list[pa.RecordBatch] = []
        self.pending_rows = self.pending_bytes = self.rows = 0

    def add(self, rows: Rows) -> None:
        """Take in a batch; it reaches the disk together with its neighbours of the same schema."""
        import numpy as np
        import pyarrow as pa

        for name, kind in zip(rows.types.names, rows.types.types, strict=True):
            self.types[name] = common_type(self.types.get(name, pa.null()), kind)
        numbers = np.arange(self.rows, self.rows + len(rows.uid), dtype=np.int64)
        self.rows += len(rows.uid)
        uid = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(rows.uid), [None, pa.py_buffer(rows.uid)])
        # A prefix keeps ours apart from the input's columns until these have got their final names.
        ours = {"\0uid": uid, "\0url": rows.url, "\0caption": rows.caption, "\0fate": rows.fate, "\0row": numbers}
        arrays = [*map(pa.array, ours.values()), *rows.columns.columns]
        batch = pa.RecordBatch.from_arrays(arrays, names=[*ours, *rows.columns.schema.names])
        if self.pending and not batch.schema.equals(self.pending[0].schema):
            self.flush()
        self.pending.append(batch)
        self.pending_rows += len(batch)
        self.pending_bytes += batch.nbytes
        if self.pending_rows >= BATCH_ROWS or self.pending_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Spread the pending rows over the buckets' files."""
        import numpy as np
        import pyarrow as pa

        if not self.pending:
            return
        batch = pa.Table.from_batches(self.pending).combine_chunks().to_batches()
        self.pending, self.pending_rows, self.pending_bytes = [], 0, 0
        for part in batch:
            uid = np.frombuffer(part.column(0).buffers()[1], np.uint8).reshape(-1, 16)[part.column(0).offset :]
            bucket = (uid[: len(part), 0].astype(np.int64) * 256 + uid[: len(part), 1]) * self.count >> 16
            order = np.argsort(bucket, kind="stable")
            bounds = np.searchsorted(bucket[order], np.arange(self.count + 1))
            spread = part.take(pa.array(order))
            for i, (start, end) in enumerate(itertools.pairwise(bounds)):
                if end > start:
                    self._append(i, spread.slice(start, end - start))

    def _append(self, bucket: int, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with self._path(bucket).open("ab") as file, pa.ipc.new_stream(file, batch.schema, options=options) as stream:
            stream.write_batch(batch)

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:03d}"

    def buckets(self) -> Iterator[pa.Table]:
        """The rows of each bucket in order, with their final columns."""
        names = _final_names(list(self.types))
        seen = 0
        for bucket in range(self.count):
            if self._path(bucket).exists():
                table = _decided(self._load(bucket), names)
                seen += len(table)
                yield table
                self._path(bucket).unlink()
        assert seen == self.rows, f"{self.rows} rows went into {self.folder}, {seen} came out"

    def _load(self, bucket: int) -> pa.Table:
        import pyarrow as pa

        tables = []
        with pa.OSFile(str(self._path(bucket))) as file:
            while file.tell() < file.size():
                with pa.ipc.open_stream(file) as stream:
                    tables += [self._typed(batch) for batch in stream]
        return pa.concat_tables(tables)

    def _typed(self, batch: pa.RecordBatch) -> pa.Table:
        """A batch with every column there is, each of its final type."""
        import pyarrow as pa

        ours = {name: batch.column(name) for name in batch.schema.names if name[0:1] == "\0"}
        return pa.table(ours | with_columns(batch, self.types))


def _final_names(columns: list[str]) -> list[str]:
    """Our columns' names and the input's own; `row` gives way to an input's column of that name."""
    row = "row" if "row" not in {name.lower() for name in columns} else source_name("input_row", columns)
    return [*OURS, row, *columns]


def _decided(table: pa.Table, names: list[str]) -> pa.Table:
    """Rows sorted by uid and input order, with repeats among the rows without a fate marked and uids as hex."""
    import numpy as np
    import pyarrow as pa

    raw = table["\0uid"].combine_chunks()
    uid = np.frombuffer(raw.buffers()[1], np.uint8)[raw.offset * 16 : (raw.offset + len(raw)) * 16].reshape(-1, 16)
    halves = np.ascontiguousarray(uid).view(">u8").astype(np.uint64)
    order = np.lexsort((table["\0row"].to_numpy(), halves[:, 1], halves[:, 0]))
    table, uid, halves = table.take(pa.array(order)), uid[order], halves[order]
    open_rows = np.flatnonzero(np.asarray(table["\0fate"].is_null()))
    same = (halves[open_rows][1:] == halves[open_rows][:-1]).all(axis=1)
    fates = np.asarray(table["\0fate"].to_pylist(), dtype=object)
    fates[open_rows[1:][same]] = REPEATED
    ours = [_hex(uid), table["\0url"], table["\0caption"], pa.array(fates, pa.string()), table["\0row"]]
    return pa.table([*ours, *table.columns[5:]], names=names)


def _hex(uid: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.stack([digits[uid >> 4], digits[uid & 15]], axis=2).reshape(-1)
    offsets = np.arange(0, text.size + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(len(uid), pa.py_buffer(offsets), pa.py_buffer(text))
