"""The mini-web as a run sees it: its settings, its list as a file, its server, and what became of its rows.

The list and the server are made anew from the settings alone, so equal settings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import Config
from pipeline.shards import DataDir, read_parquet, shard_files, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.miniweb.rows import PlannedUrl
    from pipeline.miniweb.server import Server
    from pipeline.miniweb.truth import Outcome, Planted

LIST, FATES = "list.parquet", "fates.parquet"


class MiniwebConfig(Config):
    """Which mini-web."""

    rows: int = Field(3000, ge=1, description="rows of the list")
    faults: bool = Field(True, description="plant every fault of the web, in about 40% of the rows")
    seed: int = Field(0, ge=0, description="another seed, other scenes")


def plan(config: MiniwebConfig) -> list[PlannedUrl]:
    """The rows with their faults and right fates."""
    from pipeline.miniweb.planting import build

    return build(config.seed, config.rows, config.faults)


def write_list(config: MiniwebConfig, folder: Path) -> Path:
    """Write the list that `download` is to fetch into `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(list_table(plan(config), config.seed), folder / LIST)
    return folder / LIST


@contextmanager
def serve(config: MiniwebConfig) -> Iterator[Server]:
    """Serve the mini-web until the block ends; `connect` of the server goes into the fetch's settings."""
    from pipeline.miniweb.server import running

    with running(route for row in plan(config) for route in row.routes) as server:
        yield server


def list_table(rows: list[PlannedUrl], seed: int) -> pa.Table:
    """The list: URL, caption, what the trainer and the truth need, and columns as awkward as real lists have them."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("url", pa.string()),
            ("caption", pa.string()),
            ("split", pa.string()),
            ("swaps", pa.list_(pa.string())),
            ("fault", pa.string()),
            ("expected", pa.string()),
            ("dup_group", pa.string()),
            ("taken", pa.timestamp("us", tz="UTC")),
            ("likes", pa.int32()),
            ("tags", pa.list_(pa.string())),
            ("width", pa.int64()),
            ("key", pa.string()),
        ]
    )
    return pa.Table.from_pylist([_own(row) | _awkward(row, seed, i) for i, row in enumerate(rows)], schema)


def _own(row: PlannedUrl) -> dict[str, Any]:
    names = ("url", "caption", "split", "fault", "expected")
    return {name: getattr(row, name) for name in names} | {"swaps": list(row.swaps), "dup_group": row.group}


def _awkward(row: PlannedUrl, seed: int, index: int) -> dict[str, Any]:
    """A time before and after 1970, numbers with gaps, lists that are empty or null, names that `raw` also has."""
    from datetime import UTC, datetime, timedelta

    step = (index * 7919 + seed) % 10_007
    objects = row.scene.objects if row.scene else ()
    return {
        "taken": None if step % 11 == 0 else datetime(1955, 1, 1, tzinfo=UTC) + timedelta(seconds=step * 199_999.25),
        "likes": None if step % 5 == 0 else step - 100,
        "tags": None if step % 7 == 0 else [thing.shape for thing in objects][: step % 3],
        "width": 100 + step % 900,
        "key": f"row/{index}",
    }


# ------------------------------------------------------------------------------------------- afterwards


def write_fates(data: DataDir) -> Path:
    """Write what became of every row to `miniweb/fates.parquet`, in the order of `urls/`.

    Columns: url, fault, expected, got; `right`, whether that is the right fate (in a group of copies, or of rows with
    one uid, it is not a matter of one row); and what they were judged by: uid, dup_group, split, kept_uid.
    """
    import pyarrow as pa

    from pipeline.miniweb.truth import judged

    rows = _outcomes(data)
    names = ("url", "fault", "expected", "got", "uid", "group", "split", "kept_uid")
    columns = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in names}
    columns = {"dup_group" if name == "group" else name: column for name, column in columns.items()}
    path = data.root / "miniweb" / FATES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(pa.table(columns | {"right": pa.array(judged(rows), pa.bool_())}), path)
    return path


def planted(data: DataDir) -> Planted:
    """The figures of the run that `write_fates` wrote down."""
    from pipeline.miniweb.truth import Outcome, planted_table

    table = read_parquet(data.root / "miniweb" / FATES).drop_columns(["right"])
    names = ["group" if name == "dup_group" else name for name in table.column_names]
    return planted_table(Outcome(**row) for row in table.rename_columns(names).to_pylist())


def planted_text(data: DataDir) -> str:
    """Planted against caught, by fault, as text."""
    from pipeline.miniweb.truth import planted_lines

    return "\n".join(planted_lines(planted(data)))


def _outcomes(data: DataDir) -> list[Outcome]:
    from pipeline.fates import KEPT, fates
    from pipeline.miniweb.truth import KEEP, Outcome

    kept_uids = _kept_uids(data)
    columns = ["uid", "url", "fault", "expected", "dup_group", "split"]
    found: list[Outcome] = []
    for path, decided in zip(shard_files(data.urls, "parquet"), fates(data), strict=True):
        rows = read_parquet(path, columns).rename_columns(
            ["group" if name == "dup_group" else name for name in columns]
        )
        for row, fate in zip(rows.to_pylist(), decided["fate"].to_pylist(), strict=True):
            kept_uid = kept_uids.get(row["uid"]) if fate == KEPT or fate.startswith("dedup") else None
            found.append(Outcome(**row, got=KEEP if fate == KEPT else fate, kept_uid=kept_uid))
    return found


def _kept_uids(data: DataDir) -> dict[str, str]:
    """The uid of the kept row by the uid of every row that `dedup` compared."""
    path = data.decisions / "dedup.parquet"
    if not path.exists():
        return {}
    table = read_parquet(path, ["key", "uid", "reason", "kept_key"])
    uid_of = dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    rows = zip(*(table[name].to_pylist() for name in ("uid", "reason", "kept_key")), strict=True)
    kept = ((uid, uid if reason is None else uid_of.get(key)) for uid, reason, key in rows)
    return {uid: other for uid, other in kept if other is not None}
