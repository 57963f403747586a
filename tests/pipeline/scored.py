"""Signals for test folders: the columns a test wants, in the files and with the markers that `score` would leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.books import raw_markers
from pipeline.engine import Part, Shard, run_stage
from pipeline.shards import DataDir, read_parquet, vector_column, write_parquet

TYPES = {
    "clip_sim": pa.float32(),
    "nsfw": pa.float32(),
    "phash": pa.uint64(),
    "words": pa.int32(),
    "p_en": pa.float32(),
    "filename_like": pa.bool_(),
    "spam_like": pa.bool_(),
    "near_blank": pa.bool_(),
    "decode_error": pa.string(),
}


def add_signal(data: DataDir, signal: str, identity: dict[str, Any] | None = None, **columns: Any) -> None:
    """Write one signal: `columns` hold one value per raw row, in raw order; an array of vectors becomes float16."""
    first = 0
    starts = {}
    for marker in raw_markers(data):
        starts[marker.shard] = first
        first += marker.rows

    def write(shard: Shard) -> dict[str, Part]:
        raw = read_parquet(data.raw / f"{shard.name}.parquet", ["key"])
        part = slice(starts[shard.name], starts[shard.name] + raw.num_rows)
        arrays = {name: _column(name, values[part]) for name, values in columns.items()}
        path = f"signals/{signal}/{shard.name}.parquet"
        write_parquet(pa.table({"key": raw["key"], **arrays}), data.root / path)
        return {f"score/{signal}": Part({"scored": raw.num_rows}, (path,))}

    shards = [Shard(m.shard, m.rows, (f"raw/{m.shard}.tar", f"raw/{m.shard}.parquet")) for m in raw_markers(data)]
    settings = {"identity": identity, "digest": repr(columns)} if identity else {"digest": repr(columns)}
    run_stage(data, {f"score/{signal}": settings}, write, shards)


def _column(name: str, values: Any) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return vector_column(values, ~np.isnan(values).any(axis=1))
    return pa.array(list(values), TYPES[name])
