"""The rows a report looks at: all of a small set, of a large one a fixed sample of every reason, with weights.

A row is chosen by its uid alone (a hash), so the choice is the same on every machine. It reads shard by shard and knows
nothing of pages or pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.fates import KEPT, SUPERSEDED
from pipeline.verdict.aligned import Aligned, Column

if TYPE_CHECKING:
    import pyarrow as pa

PER_REASON = 20_000  # rows of each reason that are looked at
CAPTION = 300  # characters of a caption that are kept
FIXED = ("shard", "key", "uid", "url", "caption", "error_message", "reason", "weight", "short_side", "aspect")
_RAW = ("key", "uid", "url", "caption", "error_message", "width", "height", "original_width", "original_height")
_UNTOLD = {"phash", "decode_error", "aspect"}  # an identifier, a reason, and what is told of the source picture
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#\\@]*@)?(?P<host>[^/?#\\]*)"


@dataclass(frozen=True)
class Host:
    """How a host did: rows asked of it, rows that failed, and the commonest reason (`fetch:…`)."""

    name: str
    rows: int
    failed: int
    reason: str


@dataclass(frozen=True)
class Examined:
    """`rows`: `FIXED` columns and one per signal; `weight` says how many rows each stands for (0: shown, not counted).

    `reason` is `kept` where nothing dropped the row. `signals` maps each signal's column to the signal. `counts` are
    exact, over all rows; `whole` says that `rows` holds every one of them.
    """

    rows: pa.Table
    signals: dict[str, str]
    counts: Counter[str]
    hosts: list[Host]
    whole: bool


def examine(aligned: Aligned, verdicts: Path, wanted: Collection[str] = (), hosts: int = 12) -> Examined:
    """Read the rows to look at, those with a `wanted` key among them, and the `hosts` that failed most."""
    import pyarrow as pa

    counts = count_reasons(verdicts)
    signals = _signal_columns(aligned)
    columns = {name: Column("raw", name) for name in _RAW if name in aligned.columns}
    columns |= {name: aligned.columns[name] for name in signals}
    cutoffs = {reason: _cutoff(rows) for reason, rows in counts.items()}
    keys = pa.array(sorted(wanted), pa.string())
    parts, asked = [], []
    for name, table in _shards(aligned, verdicts, columns):
        parts.append(_chosen(name, table, cutoffs, keys))
        asked.append(_by_host(table))
    rows = _weighted(pa.concat_tables(parts, promote_options="permissive"), counts)
    whole = sum(counts.values()) == sum(bool(weight) for weight in rows["weight"].to_pylist())
    return Examined(rows, signals, counts, _worst(asked, hosts), whole)


def count_reasons(verdicts: Path) -> Counter[str]:
    """Rows by reason over the whole set; rows that a later fetch replaced are left out."""
    import pyarrow.compute as pc

    counts: Counter[str] = Counter()
    for batch in verdict_batches(verdicts, ["reason"]):
        for item in pc.value_counts(batch["reason"]).to_pylist():
            counts[item["values"] or KEPT] += item["counts"]
    del counts[SUPERSEDED]
    return counts


def verdict_batches(verdicts: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A verdict file's columns, in raw order, some rows at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(verdicts) as file:
        yield from file.iter_batches(200_000, columns=columns)


def _signal_columns(aligned: Aligned) -> dict[str, str]:
    """The columns of signals that a chart can show: numbers, flags and labels; no vectors, no hashes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, str] = {}
    for signal in aligned.signals:
        schema = pq.read_schema(aligned.data.signals / signal / f"{aligned.shards[0].shard}.parquet")
        shown = {field.name for field in schema if not pa.types.is_nested(field.type)} - _UNTOLD
        places = aligned.columns.items()
        found |= {name: signal for name, place in places if place.table == signal and place.name in shown}
    return found


def _shards(aligned: Aligned, verdicts: Path, columns: dict[str, Column]) -> Iterator[tuple[str, pa.Table]]:
    """Every raw shard with its rows' reasons beside them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    batches = verdict_batches(verdicts, ["reason"])
    waiting = pa.chunked_array([], pa.string())
    for shard in aligned.shards:
        table = aligned.read(shard, columns)
        while len(waiting) < table.num_rows:
            column = next(batches)["reason"].cast(pa.string())
            waiting = pa.chunked_array([*waiting.chunks, column])
        reasons = pc.fill_null(waiting.slice(0, table.num_rows), KEPT)
        waiting = waiting.slice(table.num_rows)
        yield shard.shard, table.append_column("reason", reasons)


def _cutoff(rows: int) -> str:
    """The uid (hex digits) below which a row of a reason with so many rows is looked at."""
    share = min(1.0, PER_REASON / max(rows, 1))
    return f"{int(share * 16**8):08x}" if share < 1 else "g"  # above every digit


def _chosen(shard: str, table: pa.Table, cutoffs: dict[str, str], keys: pa.Array) -> pa.Table:
    """The rows of a shard to look at, in the form that `Examined` has; a weight of 1 where chosen by uid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pa.array(sorted(cutoffs), pa.string())
    limit = pa.array([cutoffs[reason] for reason in known.to_pylist()], pa.string())
    reason = table["reason"]
    below = pc.less(pc.utf8_slice_codeunits(table["uid"], 0, 8), limit.take(pc.index_in(reason, value_set=known)))
    below = pc.fill_null(below, False)
    named = pc.is_in(table["key"], value_set=keys)
    table = table.append_column("weight", below.cast(pa.float64())).filter(pc.or_(below, named))
    short, aspect = _sides(table)
    table = table.append_column("short_side", short).append_column("aspect", aspect)
    table = table.append_column("shard", pa.array([shard] * table.num_rows, pa.string()))
    text = pc.utf8_slice_codeunits(table["caption"], 0, CAPTION)
    table = table.set_column(table.column_names.index("caption"), "caption", text)
    return table.drop_columns(
        [name for name in table.column_names if name.removeprefix("original_") in ("width", "height")]
    )


def _sides(table: pa.Table) -> tuple[Any, Any]:
    """The source picture's shorter side in pixels, and longer over shorter; null where there is no picture."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sides = []
    for name in ("width", "height"):
        stored = table[name].cast(pa.float64())
        source = table[f"original_{name}"].cast(pa.float64()) if f"original_{name}" in table.column_names else stored
        sides.append(pc.coalesce(source, stored))
    short = pc.min_element_wise(*sides, skip_nulls=False)
    return short, pc.divide(pc.max_element_wise(*sides, skip_nulls=False), short)


def _weighted(rows: pa.Table, counts: Counter[str]) -> pa.Table:
    """Each chosen row's weight made the number of rows it stands for."""
    import numpy as np
    import pyarrow as pa

    reasons = rows["reason"].to_pylist()
    weights = rows["weight"].to_numpy()
    sampled: Counter[str] = Counter()
    for reason, weight in zip(reasons, weights, strict=True):
        sampled[reason] += int(weight)
    scale = {reason: counts[reason] / max(sampled[reason], 1) for reason in sampled}
    scaled = weights * np.array([scale[reason] for reason in reasons], dtype=np.float64)
    return rows.set_column(rows.column_names.index("weight"), "weight", pa.array(scaled))


def _by_host(table: pa.Table) -> pa.Table:
    """Rows per host and fetch failure (`reason` null: none) of one shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    host = pc.utf8_lower(pc.struct_field(pc.extract_regex(table["url"], _HOST), "host"))
    reason = pc.if_else(pc.starts_with(table["reason"], "fetch:"), table["reason"], pa.scalar(None, pa.string()))
    seen = pc.not_equal(table["reason"], SUPERSEDED)
    asked = pa.table({"host": host, "reason": reason}).filter(pc.and_(seen, pc.is_valid(host)))
    return asked.group_by(["host", "reason"]).aggregate([([], "count_all")])


def _worst(parts: list[pa.Table], limit: int) -> list[Host]:
    """The hosts with most failures; none where nothing came from a host."""
    import pyarrow as pa

    merged = pa.concat_tables(parts).group_by(["host", "reason"]).aggregate([("count_all", "sum")])
    rows, failed = Counter[str](), dict[str, Counter[str]]()
    for host, reason, count in zip(
        *(merged[name].to_pylist() for name in ("host", "reason", "count_all_sum")), strict=True
    ):
        rows[host] += count
        if reason is not None:
            failed.setdefault(host, Counter())[reason] += count
    worst = sorted(failed, key=lambda host: (-failed[host].total(), host))[:limit]
    return [Host(h, rows[h], failed[h].total(), min(failed[h], key=lambda r: (-failed[h][r], r))) for h in worst]
