"""How long `curate filter` takes and how much memory: ten million synthetic rows with all signals but the vectors.

    python -m benchmarks.filter [ROWS] [FOLDER]

The folder (default: a temporary one) is kept when it is named, so that a second measurement starts at once. The first
figures are those of a process that only filters.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import funnel
from pipeline.filter import FilterConfig, run
from pipeline.shards import DataDir, shard_name, write_parquet

SHARD_ROWS = 10_000
CONFIGS = {
    "thresholds": FilterConfig(min_clip=0.2, max_nsfw=0.5, min_words=2, min_side=100, max_aspect=3, min_p_en=0.5),
    "and repeats, fraction": FilterConfig(
        min_clip=0.2, max_nsfw=0.5, min_side=100, max_caption_repeats=20, top_fraction=0.3, drop_near_blank=True
    ),
    "and a condition": FilterConfig(min_clip=0.2, where="words BETWEEN 2 AND 50 AND caption NOT LIKE '%7%'"),
}
SIGNALS = ("raw", "caption", "clip", "image", "safety")


def make(root: Path, rows: int) -> None:
    """Write raw shards and signals of random numbers; one row in ten was not fetched."""
    data, shards = DataDir(root), [Shard(shard_name(i), SHARD_ROWS) for i in range(rows // SHARD_ROWS)]

    def write(shard: Shard) -> dict[str, Part]:
        tables, outputs = shard_tables(int(shard.name)), {}
        for stage in shard.stages:
            name = "raw" if stage == "download" else stage.removeprefix("score/")
            path = f"raw/{shard.name}.parquet" if name == "raw" else f"signals/{name}/{shard.name}.parquet"
            write_parquet(tables[name], root / path)
            outputs[stage] = Part({"made": SHARD_ROWS}, (path,))
        return outputs

    run_stage(data, {"download": {}}, write, shards)
    scored = [Shard(shard.name, shard.rows, (f"raw/{shard.name}.parquet",)) for shard in shards]
    run_stage(data, {f"score/{name}": {} for name in SIGNALS[1:]}, write, scored)


def shard_tables(index: int) -> dict[str, pa.Table]:
    """`raw` and every signal of one shard, the same in every run."""
    rng, n = np.random.default_rng(index), SHARD_ROWS
    fetched = rng.random(n) < 0.9
    hexes = rng.bytes(16 * n).hex().encode()
    uid = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), n, [None, pa.py_buffer(hexes)])
    uid = uid.cast(pa.binary()).cast(pa.string())
    words = rng.integers(0, 30, n)
    shared = (rng.pareto(1.0, n) * 20).astype(np.int64) % 2_000  # three captions in ten are one of these
    number = np.where(rng.random(n) < 0.3, shared, 2_000 + index * n + np.arange(n))
    caption = pa.array([f"caption number {i} of a pool" for i in number])
    sides = [pa.array(rng.integers(64, 2_000, n, dtype=np.int32)) for _ in range(2)]
    key = pa.array([f"{index:05d}{i:04d}" for i in range(n)])
    status = pa.array(["failed_to_download", "success"]).take(pa.array(fetched.astype(np.int64)))
    error = pa.array(["http_404: Not Found", None]).take(pa.array(fetched.astype(np.int64)))
    raw = {"uid": uid, "url": uid, "caption": caption, "key": key, "status": status, "error_message": error}
    raw |= dict(zip(("width", "height", "original_width", "original_height"), sides * 2, strict=True)) | {"sha256": uid}

    def real(values: np.ndarray) -> pa.Array:
        return pa.array(values.astype(np.float32), mask=~fetched)

    signals = {
        "caption": {"words": pa.array(words.astype(np.int32)), "p_en": real(rng.random(n))},
        "clip": {"clip_sim": real(rng.normal(0.25, 0.1, n))},
        "image": {"decode_error": pa.nulls(n, pa.string()), "near_blank": pa.array(rng.random(n) < 0.02)},
        "safety": {"nsfw": real(rng.random(n) ** 4)},
    }
    return {"raw": pa.table(raw)} | {name: pa.table({"key": key, **columns}) for name, columns in signals.items()}


def measure(root: Path, name: str) -> None:
    """Filter once in this process and print its time, its greatest memory and what it decided."""
    started = time.monotonic()
    summary = run(CONFIGS[name], DataDir(root))
    seconds, memory = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = summary.fates["kept"]
    print(f"{name:<24}{summary.rows:>12,} rows {seconds:>7.1f} s {memory:>7,.0f} MB at most, {kept:,} kept", flush=True)


def main(root: Path, rows: int) -> None:
    started = time.monotonic()
    make(root, rows)
    print(f"made in {time.monotonic() - started:.0f} s", flush=True)
    for name in CONFIGS:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(root, name))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
    started = time.monotonic()
    lines = funnel(DataDir(root))
    print(f"funnel of {len(lines)} lines in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    if len(sys.argv) > 2:
        main(Path(sys.argv[2]), count)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder), count)
