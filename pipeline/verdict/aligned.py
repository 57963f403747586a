"""The columns a data folder offers about its raw rows, and how to read some of them row by row beside each other.

`raw/`, every signal and the list's own columns, each under the one name a user may write. Signals lie in the order of
the raw rows, so they are put side by side without a join; the list's columns are found by uid. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError
from pipeline.books import Marker, raw_markers, read_markers, recorded_outputs
from pipeline.shards import DataDir, read_parquet, source_name

if TYPE_CHECKING:
    import pyarrow as pa

LIST_COLUMNS = ("uid", "url", "caption", "fate")  # of urls/, besides the list's own


@dataclass(frozen=True)
class Column:
    """Where a column lies: `table` is `raw`, `urls` or a signal's name, `name` its name in there."""

    table: str
    name: str


class Aligned:
    """The raw rows of a folder with everything known about them, shard by shard in raw order."""

    def __init__(self, data: DataDir) -> None:
        self.data = data
        self.shards = raw_markers(data)
        self.rows = sum(shard.rows for shard in self.shards)

    @cached_property
    def signals(self) -> list[str]:
        """The signals that were scored for every raw shard as it now is."""
        names = sorted(folder.name for folder in (self.data.markers / "score").glob("*"))
        return [name for name in names if self.scored(name) == len(self.shards)]

    def scored(self, signal: str) -> int:
        """For how many of the raw shards a signal was scored."""
        markers = read_markers(self.data, f"score/{signal}")
        return sum(self._fresh(markers.get(shard.shard), shard) for shard in self.shards)

    def require(self, signal: str, why: str) -> None:
        """Raise a `HeadraceError` (code 3) that names the signal and `why` it is wanted, unless it was scored."""
        if signal not in self.signals:
            done = self.scored(signal)
            state = f"was scored for {done} of {len(self.shards)} shards" if done else "was never scored"
            hint = f"run `curate score --signals {signal}`"
            raise HeadraceError(f"{why} needs the signal {signal}, which {state}", hint=hint, code=MISSING)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Every column by the name a user may write: raw's first, then the signals', then the list's own."""
        found = {name: Column("raw", name) for name in self._schema("raw").names}
        for signal in self.signals:
            for name in self._schema(f"signals/{signal}").names:
                if name != "key":
                    found[f"{signal}_{name}" if name in found else name] = Column(signal, name)
        if self._listed:
            for name in self._schema("urls").names:
                if name not in LIST_COLUMNS:
                    found[source_name(name, found)] = Column("urls", name)
        return found

    def inputs(self, columns: Collection[Column]) -> tuple[str, ...]:
        """The files (relative) that reading these columns needs."""
        tables = {column.table for column in columns}
        raw = [f"raw/{shard.shard}.parquet" for shard in self.shards]
        signals = [self._file(signal, shard) for signal in sorted(tables - {"raw", "urls"}) for shard in self.shards]
        return (*raw, *signals, *(self._listed if "urls" in tables else ()))

    def batches(self, columns: dict[str, Column], batch_rows: int) -> Iterator[pa.Table]:
        """The raw rows in order with these columns, in tables of whole shards, `batch_rows` or a little more each."""
        import pyarrow as pa

        waiting: list[pa.Table] = []
        for shard in self.shards:
            waiting.append(self.read(shard, columns))
            if sum(table.num_rows for table in waiting) >= batch_rows:
                yield pa.concat_tables(waiting, promote_options="permissive")
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting, promote_options="permissive")

    def read(self, shard: Marker, columns: dict[str, Column]) -> pa.Table:
        """One raw shard with these columns, a row per raw row."""
        import pyarrow as pa

        tables = {}
        for table in sorted({column.table for column in columns.values()}):
            names = [column.name for column in columns.values() if column.table == table]
            tables[table] = self._list_rows(shard, names) if table == "urls" else self._rows(table, shard, names)
        return pa.table({name: tables[column.table][column.name] for name, column in columns.items()})

    def _rows(self, table: str, shard: Marker, names: Sequence[str]) -> pa.Table:
        path = self.data.root / self._file(table, shard)
        rows = read_parquet(path, list(dict.fromkeys(names)))
        if rows.num_rows != shard.rows:
            message = f"{path} has {rows.num_rows:,} rows where raw/{shard.shard}.parquet has {shard.rows:,}"
            raise HeadraceError(message, hint="run `curate score` again", code=MISSING)
        return rows

    def _list_rows(self, shard: Marker, names: Sequence[str]) -> pa.Table:
        """The list's rows that belong to a raw shard's rows, found by uid; nulls where there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        uid = self._rows("raw", shard, ["uid"])["uid"].combine_chunks()
        wanted = ["uid", "fate", *dict.fromkeys(names)]
        path = f"urls/{shard.shard}.parquet"
        files = [path] if path in self._listed else self._listed  # fetched again: they are spread over the list
        found = []
        for file in files:
            rows = read_parquet(self.data.root / file, wanted)
            found.append(rows.filter(pc.and_(pc.is_null(rows["fate"]), pc.is_in(rows["uid"], value_set=uid))))
        rows = pa.concat_tables(found, promote_options="permissive")
        return rows.take(pc.index_in(uid, value_set=rows["uid"].combine_chunks()))

    @cached_property
    def _listed(self) -> list[str]:
        return [name for name in sorted(self._recorded) if name.startswith("urls/") and name.endswith(".parquet")]

    def _schema(self, table: str) -> pa.Schema:
        import pyarrow.parquet as pq

        first = self._listed[0] if table == "urls" else f"{table}/{self.shards[0].shard}.parquet"
        read_parquet(self.data.root / first, [])
        return pq.read_schema(self.data.root / first)

    def _file(self, table: str, shard: Marker) -> str:
        return f"{table}/{shard.shard}.parquet" if table == "raw" else f"signals/{table}/{shard.shard}.parquet"

    def _fresh(self, marker: Marker | None, shard: Marker) -> bool:
        name = f"raw/{shard.shard}.parquet"
        return marker is not None and marker.inputs.get(name) == self._recorded.get(name, {}).get("sha256")

    @cached_property
    def _recorded(self) -> dict[str, Mapping[str, Any]]:
        return recorded_outputs(self.data)
