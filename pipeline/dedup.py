"""`curate dedup`: near-duplicate pairs of all pictures, once; then, in seconds, which of them stays.

`decisions/pairs.parquet` holds every pair down to a floor, whatever the filter keeps. The choice among the rows that
`filter` keeps is made from it, so that a new filter or threshold does not search again. It reads signals only.

Two pictures are near when their perceptual hashes are all but equal and their vectors agree (the hash knows no colour,
and simple pictures share one), or when their hashes are not far and their vectors all but equal (as after a crop).

Memory: the vectors, twice (2 x 512 bytes a row for 256 dimensions), and some 200 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.base import MISSING, Config, HeadraceError
from pipeline.books import Summary
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import DEDUP, FILTER, KEPT, PAIRS
from pipeline.shards import DataDir, read_parquet

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipeline.near.choice import Chosen, Links
    from pipeline.near.neighbours import Near
    from pipeline.verdict.aligned import Aligned, Column

BATCH_ROWS = 100_000
COLUMNS = ("key", "uid", "reason", "fails", "cluster", "kept_key", "cosine", "hamming")
SIDES = ("width", "height", "original_width", "original_height")


class DedupConfig(Config):
    """What counts as a near-duplicate. Pairs are remembered down to the bounds given here."""

    max_hamming: int = Field(4, ge=0, le=8, description="most different bits of the hashes of near pictures")
    min_cosine: float = Field(0.92, ge=0.85, le=1, description="their least cosine")
    crop_hamming: int = Field(
        16, ge=0, le=20, description="a crop moves the hash: as near are pictures within these bits"
    )
    crop_cosine: float = Field(0.98, ge=0.96, le=1, description="if their cosine is at least this")
    max_hamming_alone: int = Field(4, ge=0, le=8, description="most different bits where there is no clip signal")
    against: str | None = Field(None, description="drop what is near this set: pictures, a packed set or a data folder")
    against_hamming_alone: int | None = Field(
        None, ge=0, le=8, description="`max_hamming_alone` for that set, where it is to have a wider berth"
    )


def run(config: DedupConfig, data: DataDir) -> Summary:
    """Bring the pairs and the choice up to date: `decisions/pairs.parquet` and `decisions/dedup.parquet`.

    Raises:
        HeadraceError: `filter` has not run or no signal to compare by (code 3), or a held-out set scored by another
            CLIP (4).
    """
    from pipeline.near.neighbours import FLOOR
    from pipeline.near.pairs import FindPairs
    from pipeline.verdict.aligned import Aligned

    aligned = Aligned(data)
    columns = _compared(aligned)
    _check_filter(aligned)
    everything = Shard("all", aligned.rows, aligned.inputs(columns.values()))
    find = FindPairs(aligned, columns)
    run_stage(data, {"pairs": {"floor": FLOOR._asdict()}}, find, [everything], hash_inputs=False)
    held = _run_against(config, aligned, columns)
    near = _near(config)
    alone = config.against_hamming_alone
    berth = near if alone is None else near._replace(alone=alone)
    choice = _Choose(aligned, near, berth, bool(held))
    used = {*aligned.inputs(choice.columns().values()), FILTER, PAIRS, *held}
    shard = Shard("all", aligned.rows, tuple(sorted(used)))
    settings = {"near": near._asdict()} | ({} if berth == near else {"against": berth._asdict()})
    return run_stage(data, {"dedup": settings}, choice, [shard], hash_inputs=False)


def _run_against(config: DedupConfig, aligned: Aligned, columns: dict[str, Column]) -> tuple[str, ...]:
    """Find what is near the held-out set; without one, remove what an earlier run found. Returns the file, if any."""
    from pipeline.near.heldout import fingerprint
    from pipeline.near.neighbours import FLOOR
    from pipeline.near.pairs import AGAINST, FindAgainst

    if config.against is None:
        run_stage(aligned.data, {"against": {}}, _no_work, [])
        return ()
    place = Path(config.against)
    settings = {"floor": FLOOR._asdict(), "held_out": fingerprint(place)}
    shard = Shard("all", aligned.rows, aligned.inputs(columns.values()))
    find = FindAgainst(aligned, columns, place)
    run_stage(aligned.data, {"against": settings}, find, [shard], hash_inputs=False)
    return (AGAINST,)


def _no_work(shard: Shard) -> dict[str, Part]:
    raise AssertionError("a stage without shards has no work")


def _compared(aligned: Aligned) -> dict[str, Column]:
    """The columns that pictures are compared by."""
    from pipeline.verdict.aligned import Column

    found = {"phash": Column("phash", "phash"), "image_emb": Column("clip", "image_emb")}
    found = {name: column for name, column in found.items() if column.table in aligned.signals}
    if not found:
        aligned.require("phash", "dedup")
    return found


def _check_filter(aligned: Aligned) -> None:
    """Refuse verdicts of `filter` that are missing or not of these rows."""
    import pyarrow.parquet as pq

    path = aligned.data.root / FILTER
    if not path.exists() or pq.read_metadata(path).num_rows != aligned.rows:
        state = "is not of the raw rows as they are now" if path.exists() else "is missing"
        raise HeadraceError(f"{path} {state}", hint="run `curate filter` first", code=MISSING)


def _near(config: DedupConfig) -> Near:
    from pipeline.near.neighbours import Near

    return Near(
        config.max_hamming, config.min_cosine, config.crop_hamming, config.crop_cosine, config.max_hamming_alone
    )


# --- the choice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choose:
    """Writes the verdicts: of what the filter keeps, each row that stays, or why not."""

    aligned: Aligned
    near: Near
    berth: Near  # the same of held-out pictures
    held_out: bool

    def columns(self) -> dict[str, Column]:
        """What decides the keep order, besides the filter's own columns."""
        from pipeline.verdict.aligned import Column

        found = {name: Column("raw", name) for name in ("key", "sha256", *SIDES)}
        return found | ({"clip_sim": Column("clip", "clip_sim")} if "clip" in self.aligned.signals else {})

    def __call__(self, shard: Shard) -> dict[str, Part]:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        from pipeline.near.choice import choose
        from pipeline.tables import write_stream

        verdicts = read_parquet(self.aligned.data.root / FILTER)
        rows = pa.concat_tables(self.aligned.batches(self.columns(), BATCH_ROWS))
        held = self._held_out(rows["key"])
        passed = np.asarray(verdicts["reason"].is_null()) & ~np.asarray(held["against_key"].is_valid())
        links = _links(read_parquet(self.aligned.data.root / PAIRS), ("key_a", "key_b"), rows["key"])
        rank = _ranks(rows["key"], verdicts["uid"])
        chosen = choose(links, _holding(self.near, links), passed, _place(rows, rank))
        table = _decided(verdicts, rows, chosen, held)
        table = table.append_column("cluster", _clusters(links, rank, verdicts["uid"]))
        table = table.select([*COLUMNS, *(["against_key"] if self.held_out else [])])
        write_stream([table], table.schema, self.aligned.data.root / DEDUP)
        counted = pc.value_counts(table["reason"])
        names = [name or KEPT for name in counted.field(0).to_pylist()]
        return {"dedup": Part(dict(zip(names, counted.field(1).to_pylist(), strict=True)), (DEDUP,))}

    def _held_out(self, keys: pa.ChunkedArray) -> pa.Table:
        """For each row the nearest held-out picture it is near: (against_key, cosine, hamming), NULL where none is."""
        import numpy as np
        import pyarrow as pa

        from pipeline.near.pairs import AGAINST

        if not self.held_out:
            types = {"against_key": pa.string(), "cosine": pa.float32(), "hamming": pa.int32()}
            return pa.table({name: pa.nulls(len(keys), kind) for name, kind in types.items()})
        table = read_parquet(self.aligned.data.root / AGAINST)
        table = table.filter(pa.array(_holding(self.berth, _links(table, ("key", "key"), keys))))
        order = [("key", "ascending"), ("cosine", "descending"), ("hamming", "ascending"), ("against_key", "ascending")]
        table = table.sort_by(order)
        _, first = np.unique(np.asarray(table["key"].to_pylist(), dtype=str), return_index=True)
        table = table.take(pa.array(first))
        places = _index_in(keys, table["key"])
        return table.select(["against_key", "cosine", "hamming"]).take(places)


def _holding(near: Near, links: Links) -> NDArray[np.bool_]:
    """Which links are near by the thresholds in force."""
    import numpy as np

    if not len(links.a):
        return np.zeros(0, dtype=bool)
    cosine = None if np.isnan(links.cosine).all() else links.cosine
    return near.holds(cosine, None if (links.hamming < 0).all() else links.hamming)


def _index_in(values: pa.ChunkedArray, among: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where each value stands in another column, NULL where it does not."""
    import pyarrow.compute as pc

    return pc.index_in(values, value_set=among.combine_chunks())


def _links(table: pa.Table, names: tuple[str, str], keys: pa.ChunkedArray) -> Links:
    """Stored pairs with row numbers for keys."""
    import pyarrow.compute as pc

    from pipeline.near.choice import Links

    a, b = (_index_in(table[name], keys).to_numpy().astype("int64") for name in names)
    cosine = pc.fill_null(table["cosine"], float("nan")).to_numpy()
    return Links(a, b, cosine, pc.fill_null(table["hamming"], -1).to_numpy())


def _ranks(keys: pa.ChunkedArray, uids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Each row's place in the order of uids (and keys, should a uid occur twice)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = pa.table({"uid": uids, "key": keys})
    order = pc.sort_indices(rows, sort_keys=[("uid", "ascending"), ("key", "ascending")]).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _place(rows: pa.Table, rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row's place in keep order, by the sides of its source."""
    import numpy as np
    import pyarrow.compute as pc

    from pipeline.near.choice import keep_order

    width, height = (
        pc.fill_null(pc.coalesce(rows[f"original_{side}"], rows[side]), 0).to_numpy() for side in ("width", "height")
    )
    similarity = np.full(rows.num_rows, np.nan, dtype=np.float32)
    if "clip_sim" in rows.column_names:
        similarity = pc.fill_null(rows["clip_sim"], float("nan")).to_numpy()
    return keep_order(np.minimum(width, height), np.maximum(width, height), similarity, rank)


def _clusters(links: Links, rank: NDArray[np.int64], uids: pa.ChunkedArray) -> pa.ChunkedArray:
    """For each row that has any pair the least uid of those it hangs together with, by pairs down to the floor."""
    import numpy as np
    import pyarrow as pa

    from pipeline.near.choice import components

    least = components(len(rank), rank[links.a], rank[links.b])[rank]
    order = np.argsort(rank)
    return uids.take(pa.array(order[least], mask=least < 0))


def _decided(verdicts: pa.Table, rows: pa.Table, chosen: Chosen, held: pa.Table) -> pa.Table:
    """The filter's verdicts with dedup's: reason, kept_key, cosine, hamming, against_key."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    dropped = chosen.kept >= 0
    kept = pa.array(chosen.kept, mask=~dropped)
    same = pc.fill_null(pc.equal(rows["sha256"], rows["sha256"].take(kept)), False)
    copy = pc.if_else(pa.array(dropped), pc.if_else(same, "dedup:exact", "dedup:near"), pa.scalar(None, pa.string()))
    against = pc.if_else(pc.is_valid(held["against_key"]), "dedup:against", pa.scalar(None, pa.string()))
    measured = pa.array(chosen.cosine, mask=np.isnan(chosen.cosine)), pa.array(chosen.hamming, mask=chosen.hamming < 0)
    return pa.table(
        {
            "key": verdicts["key"],
            "uid": verdicts["uid"],
            "reason": pc.coalesce(verdicts["reason"], against, copy),
            "fails": verdicts["fails"],
            "kept_key": rows["key"].take(kept),
            "cosine": pc.coalesce(measured[0], held["cosine"]),
            "hamming": pc.coalesce(measured[1], held["hamming"]),
            "against_key": held["against_key"],
        }
    )
