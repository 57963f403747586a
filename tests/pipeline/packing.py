"""Makes small decided folders for the tests of `pack` and of what reads a packed set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.books import raw_markers
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import DEDUP, FILTER, PAIRS
from pipeline.pack import PackConfig, run
from pipeline.shards import DataDir, read_parquet, vector_column, write_parquet
from tests.pipeline.factory import Row, make_raw, picture

IDENTITY = {"name": "tiny", "weights_sha256": "0" * 64, "preprocessing": "none", "dimension": 8}
METADATA = {"clip": json.dumps({"identity": IDENTITY, "device": "cpu"})}
RECIPE = {"filter": {"min_clip": 0.2}}


def rows(count: int, **extra: object) -> list[Row]:
    """Good rows with pictures and captions of their own."""
    return [Row(picture(i, 48), f"picture number {i}", extra=dict(extra)) for i in range(count)]


def raw_table(data: DataDir) -> pa.Table:
    """All raw rows in order."""
    return pa.concat_tables([read_parquet(data.raw / f"{marker.shard}.parquet") for marker in raw_markers(data)])


def score(data: DataDir, clip: bool = True) -> None:
    """Signals as `score` leaves them: phash, and vectors that depend on the key alone."""

    def write(shard: Shard) -> dict[str, Part]:
        table = read_parquet(data.raw / f"{shard.name}.parquet")
        good = np.array([status == "success" for status in table["status"].to_pylist()])
        has_text = good & np.array([bool(caption) for caption in table["caption"].to_pylist()])
        numbers = [int(key) for key in table["key"].to_pylist()]
        image, text = (np.stack([_unit(n, seed) for n in numbers]) for seed in (0, 1))
        signals = {
            "score/phash": {"phash": pa.array(numbers, pa.uint64(), mask=~good)},
            "score/clip": {
                "clip_sim": pa.array(np.sum(image * text, axis=1), pa.float32(), mask=~has_text),
                "image_emb": vector_column(image, good),
                "text_emb": vector_column(text, has_text),
            },
        }
        parts = {}
        for stage in shard.stages:
            path = f"signals/{stage.partition('/')[2]}/{shard.name}.parquet"
            scored = pa.table({"key": table["key"], **signals[stage]})
            write_parquet(scored.replace_schema_metadata(METADATA if stage == "score/clip" else {}), data.root / path)
            parts[stage] = Part({"scored": table.num_rows}, (path,))
        return parts

    stages = {"score/phash": {}} | ({"score/clip": {"identity": IDENTITY}} if clip else {})
    shards = [Shard(m.shard, m.rows, (f"raw/{m.shard}.parquet",)) for m in raw_markers(data)]
    run_stage(data, stages, write, shards)


def _unit(number: int, seed: int) -> np.ndarray:
    vector = np.random.default_rng([number, seed]).normal(size=8).astype(np.float32)
    return vector / np.linalg.norm(vector)


def decide(data: DataDir, drop: Mapping[int, str] | None = None) -> None:
    """`decisions/filter.parquet`: the raw rows numbered in `drop` get that reason, failed ones theirs."""

    def write(shard: Shard) -> dict[str, Part]:
        table, chosen = raw_table(data), drop or {}
        reasons = [
            f"fetch:{error}" if error else chosen.get(i) for i, error in enumerate(table["error_message"].to_pylist())
        ]
        out = {"key": table["key"], "uid": table["uid"], "reason": pa.array(reasons, pa.string())}
        write_parquet(pa.table(out), data.root / FILTER)
        return {"filter": Part({"rows": table.num_rows}, (FILTER,))}

    inputs = tuple(f"raw/{marker.shard}.parquet" for marker in raw_markers(data))
    shard = Shard("all", sum(marker.rows for marker in raw_markers(data)), inputs)
    settings = {"drop": {str(row): reason for row, reason in (drop or {}).items()}}
    run_stage(data, {"filter": settings}, write, [shard])


def dedup(data: DataDir, pairs: Sequence[tuple[int, int]] = (), drop: Mapping[int, str] | None = None) -> None:
    """`pairs.parquet` and `dedup.parquet`: pairs of raw row numbers, and what dedup drops besides the filter."""
    table = raw_table(data)
    keys = table["key"].to_pylist()

    def write_pairs(shard: Shard) -> dict[str, Part]:
        columns = {
            f"key_{side}": pa.array([keys[pair[i]] for pair in pairs], pa.string()) for i, side in enumerate("ab")
        }
        write_parquet(pa.table(columns), data.root / PAIRS)
        return {"pairs": Part({"rows": table.num_rows}, (PAIRS,))}

    def write_dedup(shard: Shard) -> dict[str, Part]:
        reasons = read_parquet(data.root / FILTER)["reason"].to_pylist()
        reasons = [reason or (drop or {}).get(i) for i, reason in enumerate(reasons)]
        out = {"key": table["key"], "uid": table["uid"], "reason": pa.array(reasons, pa.string())}
        write_parquet(pa.table(out), data.root / DEDUP)
        return {"dedup": Part({"rows": table.num_rows}, (DEDUP,))}

    inputs = tuple(f"raw/{marker.shard}.parquet" for marker in raw_markers(data))
    run_stage(data, {"pairs": {"pairs": list(pairs)}}, write_pairs, [Shard("all", table.num_rows, inputs)])
    settings = {"drop": {str(row): reason for row, reason in (drop or {}).items()}}
    run_stage(data, {"dedup": settings}, write_dedup, [Shard("all", table.num_rows, (FILTER, PAIRS))])


def packed(root: Path, listed: list[Row], clip: bool = True, shard_size: int = 20, raw_size: int = 16) -> DataDir:
    """A packed set of all good rows among `listed`."""
    data = make_raw(root, listed, raw_size)
    score(data, clip)
    decide(data)
    run(PackConfig(shard_size=shard_size), data, 1, RECIPE)
    return data


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
