"""The work of `dedup` that is done once: every near-duplicate pair down to a floor, among a folder's own pictures and
with those of a held-out set. It decides nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engine import Part, Shard
from pipeline.fates import PAIRS
from pipeline.near.heldout import prints_of, read
from pipeline.near.neighbours import FLOOR, Fingerprints, Pairs, between, near_pairs
from pipeline.tables import write_stream
from pipeline.verdict.aligned import Aligned, Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

AGAINST = "decisions/against.parquet"
BATCH_ROWS = 100_000


def _pictures(aligned: Aligned, columns: dict[str, Column]) -> tuple[pa.Table, Fingerprints]:
    """All rows that can be compared, in the order of their uids: (key, uid, sha256) and their fingerprints.

    That order makes what follows independent of the order of the raw rows.
    """
    names = {name: Column("raw", name) for name in ("key", "uid", "sha256")}
    rows = pa.concat_tables(_complete(table, columns) for table in aligned.batches(names | columns, BATCH_ROWS))
    prints, rows = prints_of(rows), rows.select(list(names))
    order = pc.sort_indices(rows, sort_keys=[("uid", "ascending"), ("key", "ascending")]).to_numpy().astype(np.int64)
    return rows.take(order), prints.take(order)


def _complete(table: pa.Table, columns: Iterable[str]) -> pa.Table:
    """The rows in which none of these columns is NULL."""
    for name in columns:
        table = table.filter(pc.is_valid(table[name]))
    return table


@dataclass(frozen=True)
class FindPairs:
    """Writes all near-duplicate pairs down to the floor: key_a, key_b, cosine, hamming, exact (same source bytes)."""

    aligned: Aligned
    columns: dict[str, Column]

    def __call__(self, shard: Shard) -> dict[str, Part]:
        rows, prints = _pictures(self.aligned, self.columns)
        sources = _sources(rows)
        found = near_pairs(prints, sources, FLOOR)
        if found.capped:
            print(f"pairs: {found.capped:,} pictures have more near neighbours than are remembered", file=sys.stderr)
        exact = (sources[found.pairs.a] == sources[found.pairs.b]) if rows.num_rows else np.zeros(0, dtype=bool)
        table = _pair_table(rows["key"], rows["key"], found.pairs, ("key_a", "key_b")).append_column("exact", [exact])
        write_stream([table], table.schema, self.aligned.data.root / PAIRS)
        paired = int(pc.count_distinct(_both(table)).as_py())
        fates = {"paired": paired, "alone": rows.num_rows - paired, "no_picture": self.aligned.rows - rows.num_rows}
        return {"pairs": Part(fates, (PAIRS,))}


def _both(table: pa.Table) -> pa.ChunkedArray:
    return pa.chunked_array([*table["key_a"].chunks, *table["key_b"].chunks], pa.string())


def _sources(rows: pa.Table) -> NDArray[np.uint64]:
    """64 bits of each row's source hash; of its key where none is known, so that it equals no other."""
    texts = (sha or f"key {key}" for sha, key in zip(rows["sha256"].to_pylist(), rows["key"].to_pylist(), strict=True))
    return np.frombuffer(b"".join(hashlib.sha256(t.encode()).digest()[:8] for t in texts), dtype=np.uint64)


def _pair_table(ours: pa.ChunkedArray, theirs: pa.ChunkedArray, pairs: Pairs, names: tuple[str, str]) -> pa.Table:
    count = len(pairs.a)
    columns = [ours.take(pa.array(pairs.a)), theirs.take(pa.array(pairs.b))]
    columns.append(pa.nulls(count, pa.float32()) if pairs.cosine is None else pa.array(pairs.cosine))
    columns.append(pa.nulls(count, pa.int32()) if pairs.hamming is None else pa.array(pairs.hamming))
    return pa.table(columns, names=[*names, "cosine", "hamming"])


@dataclass(frozen=True)
class FindAgainst:
    """Writes which rows are near which pictures of the held-out set: key, against_key, cosine, hamming."""

    aligned: Aligned
    columns: dict[str, Column]
    place: Path

    def __call__(self, shard: Shard) -> dict[str, Part]:
        rows, prints = _pictures(self.aligned, self.columns)
        held = read(self.place, self.aligned.data, self.columns)
        found = between(prints, held.prints, FLOOR, within=False)
        table = _pair_table(rows["key"], pa.chunked_array([held.names]), found.pairs, ("key", "against_key"))
        write_stream([table], table.schema, self.aligned.data.root / AGAINST)
        near = int(pc.count_distinct(table["key"]).as_py())
        fates = {"near": near, "apart": rows.num_rows - near, "no_picture": self.aligned.rows - rows.num_rows}
        return {"against": Part(fates, (AGAINST,))}
