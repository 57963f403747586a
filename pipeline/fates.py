"""The books over all stages: which verdict holds, what became of every input row, and the funnel.

It reads `urls/`, `raw/` and `decisions/` and changes nothing. A fate is `stage:reason`, or `kept`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.base import FINDINGS, MISSING, HeadraceError
from pipeline.books import raw_markers, read_markers, recorded_outputs
from pipeline.shards import DataDir, read_parquet, shard_files

if TYPE_CHECKING:
    import pyarrow as pa

KEPT = "kept"
SUPERSEDED = "superseded"
NOT_YET = "fetch:not_yet"  # the download or ingest was stopped before these rows
FILTER, PAIRS, DEDUP = (f"decisions/{name}.parquet" for name in ("filter", "pairs", "dedup"))
RULES = (
    "min_side",
    "max_aspect",
    "near_blank",
    "no_caption",
    "min_words",
    "max_words",
    "filename_caption",
    "spam_caption",
    "min_p_en",
    "max_caption_repeats",
    "max_nsfw",
    "min_clip",
    "top_fraction",
    "block",
    "where",
)
STAGES = ("urls", "fetch", "image", "filter", "dedup", KEPT)


class Count(NamedTuple):
    """How many input rows ended at `stage`, and why; the last line of a funnel is (`kept`, empty)."""

    stage: str
    reason: str
    rows: int


class Effect(NamedTuple):
    """A rule: rows it is the reason for, rows it would drop alone, and rows that no other rule drops."""

    rule: str
    dropped: int
    alone: int
    only: int


def verdicts(data: DataDir) -> Path | None:
    """The file with the verdicts in force: dedup's where it was made from the present filter's, else filter's."""
    if not (data.root / FILTER).exists():
        return None
    marker, now = read_markers(data, "dedup").get("all"), recorded_outputs(data)
    fresh = marker and marker.inputs.get(FILTER) == now.get(FILTER, {}).get("sha256")
    return data.root / DEDUP if fresh and (data.root / DEDUP).exists() else data.root / FILTER


def funnel(data: DataDir) -> list[Count]:
    """Where the input rows ended, in the order of stages and rules; the counts sum to the input rows."""
    fates: Counter[str] = Counter()
    for batch in _verdict_columns(data, ["reason"]):
        fates.update(_counts(batch["reason"]))
    del fates[SUPERSEDED]
    waiting = -fates.total()  # rows that were to be fetched, less those that were
    for path in shard_files(data.urls, "parquet"):
        column = read_parquet(path, ["fate"])["fate"]
        waiting += column.null_count
        fates.update({fate: rows for fate, rows in _counts(column).items() if fate != KEPT})
    if waiting > 0:
        fates[NOT_YET] = waiting
    return [Count(*_split(fate), rows) for fate, rows in sorted(fates.items(), key=lambda item: _place(*item))]


def _place(fate: str, rows: int) -> tuple[int, int, int, str]:
    stage, reason = _split(fate)
    rule = RULES.index(reason) if stage == "filter" and reason in RULES else len(RULES)
    return STAGES.index(stage) if stage in STAGES else len(STAGES), rule, -rows, reason


def _split(fate: str) -> tuple[str, str]:
    stage, _, reason = fate.partition(":")
    return stage, reason


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    import pyarrow.compute as pc

    counted = pc.value_counts(column)
    return {
        value or KEPT: rows
        for value, rows in zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True)
    }


def effects(data: DataDir) -> list[Effect]:
    """What each rule of the last `filter` does, in order, over the rows that have a picture."""
    dropped, alone, only = Counter[str](), Counter[str](), Counter[str]()
    for batch in _verdict_columns(data, ["fails"]):
        for fails, rows in _combinations(batch["fails"]).items():
            dropped[fails[0]] += rows
            alone.update(dict.fromkeys(fails, rows))
            if len(fails) == 1:
                only[fails[0]] += rows
    return [Effect(rule, dropped[rule], alone[rule], only[rule]) for rule in RULES if alone[rule]]


def _combinations(column: pa.ChunkedArray) -> dict[tuple[str, ...], int]:
    """How often each non-empty list of rules occurs."""
    import pyarrow.compute as pc

    joined = pc.binary_join(column.combine_chunks(), " ")
    return {tuple(rules.split(" ")): rows for rules, rows in _counts(joined).items() if rules != KEPT}


def _verdict_columns(data: DataDir, columns: list[str]) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = verdicts(data)
    if path is None:
        raise HeadraceError(f"{data.root} has no decisions yet", hint="run `curate filter` first", code=MISSING)
    with pq.ParquetFile(path, read_dictionary=["reason"]) as file:
        for batch in file.iter_batches(1_000_000, columns=columns):
            yield pa.Table.from_batches([batch])


def fates(data: DataDir) -> Iterator[pa.Table]:
    """Every input row with its one fate, in the list's order: tables (uid, url, fate), one per shard of `urls/`.

    A row that was fetched has the fate of its uid's row that counts, in whichever raw shard that lies.

    Raises:
        HeadraceError: code 1, when an input row has no fate: the books do not balance.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    moved = [rows for urls, rows in _decided(data) if not urls.exists()]  # fetched again, into shards of their own
    for path, rows in _decided(data):
        if not path.exists():
            continue
        table = read_parquet(path, ["uid", "url", "fate"])
        own = [part.filter(pc.is_in(part["uid"], value_set=table["uid"].combine_chunks())) for part in moved]
        known = pa.concat_tables([rows, *own])
        found = known["fate"].take(pc.index_in(table["uid"], value_set=known["uid"].combine_chunks()))
        table = table.set_column(2, "fate", pc.coalesce(table["fate"].cast(pa.string()), found))
        if missing := table["fate"].null_count:
            message = f"{missing:,} rows of {path} have no fate"
            raise HeadraceError(message, hint="run `curate download`, then `curate filter`", code=FINDINGS)
        yield table


def _decided(data: DataDir) -> Iterator[tuple[Path, pa.Table]]:
    """For each raw shard the place of its `urls/` file, and the rows of it that count: (uid, fate)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    reasons = pa.concat_tables(_verdict_columns(data, ["reason"]))["reason"]
    first = 0
    for marker in raw_markers(data):
        uid = read_parquet(data.raw / f"{marker.shard}.parquet", ["uid"])["uid"]
        fate = pc.fill_null(reasons.slice(first, marker.rows), KEPT)
        first += marker.rows
        rows = pa.table({"uid": uid, "fate": fate.cast(pa.string())})
        yield data.urls / f"{marker.shard}.parquet", rows.filter(pc.not_equal(rows["fate"], SUPERSEDED))
