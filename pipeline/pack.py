"""Survivors to `curated/`: tars with the stored bytes, Parquet with all numbers beside them, a manifest and a card.

`split` decides which sample goes into which shard (`decisions/split.parquet`); then one output shard is one unit of
work that copies picture bytes from the raw tars and decodes nothing. It knows not what a signal or a reason means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import MISSING, REFUSED, Config, HeadraceError, atomic_path
from pipeline.books import Summary, read_markers, recorded_outputs, stale_files
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import DEDUP, FILTER
from pipeline.packed import publish, split
from pipeline.packed.manifest import NAME
from pipeline.shards import (
    IMAGE_EXTENSIONS,
    DataDir,
    Member,
    Sample,
    TarWriter,
    canonical_json,
    read_parquet,
    read_tar,
    shard_name,
    source_name,
    split_name,
    write_parquet,
)
from pipeline.verdict.aligned import Aligned, Column

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS, SIDES = ("uid", "url", "caption"), ("width", "height")
PLACE = ("offset", "length")
FROM_RAW = ("original_width", "original_height", "sha256")
VECTORS = ("image_emb", "text_emb")


class PackConfig(Config):
    """How survivors become a packed set."""

    shard_size: int = Field(5000, ge=1, le=99_999, description="samples per packed shard")
    val_fraction: float = Field(
        0.02, ge=0, le=0.1, description="share of samples held out in val (at least 256, at most 10%; 0: none)"
    )


def run(config: PackConfig, data: DataDir, workers: int, recipe: Mapping[str, Any]) -> Summary:
    """Bring `curated/` up to date with the decisions in force; `recipe` is the resolved one, for the manifest.

    Raises:
        HeadraceError: code 1 when nothing survived, 3 when an input is missing, 4 when decisions are out of date.
    """
    aligned = Aligned(data)
    verdicts = _verdicts(data, aligned)
    for signal in sorted(folder.name for folder in (data.markers / "score").glob("*")):
        aligned.require(signal, "a packed set")
    split.run(data, aligned, verdicts, config.shard_size, config.val_fraction)
    columns = _columns(aligned)
    schema = _schema(data, aligned, columns)
    shards = _shards(data, aligned)
    settings = {"columns": {field.name: str(field.type) for field in schema}}
    summary = run_stage(
        data,
        {"pack": settings},
        _Pack(data, aligned, columns, schema.serialize().to_pybytes()),
        shards,
        workers=workers,
    )
    publish.run(data, settings["columns"], recipe)
    return summary


# --- what may be packed ---------------------------------------------------------------------------


def _verdicts(data: DataDir, aligned: Aligned) -> str:
    """The decisions in force: dedup's if it ever ran, else filter's; out of date is an error, not a guess."""
    recorded = recorded_outputs(data)
    markers = {stage: read_markers(data, stage).get("all") for stage in ("filter", "dedup")}
    if markers["filter"] is None:
        raise HeadraceError(f"{data.root} has no decisions yet", hint="run `curate filter` first", code=MISSING)
    for stage, marker in markers.items():
        if marker is None:
            continue
        if reasons := stale_files(data, marker, recorded):
            older = "dedup is older than filter" if f"{FILTER} was made anew" in reasons else f"{stage} is out of date"
            raise HeadraceError(f"{older}: {reasons[0]}", hint=f"run `curate {stage}`, then pack again", code=REFUSED)
        if marker.rows != aligned.rows:
            message = f"{stage} decided {marker.rows:,} rows, but raw/ now holds {aligned.rows:,}"
            raise HeadraceError(message, hint="run `curate filter` and `curate dedup`, then pack again", code=REFUSED)
    return FILTER if markers["dedup"] is None else DEDUP


def _shards(data: DataDir, aligned: Aligned) -> list[Shard]:
    """The output shards, with the files that each is made of."""
    names = ["split", "shard", "raw"]
    plan = read_parquet(data.root / split.FILE, names)
    rows: dict[str, int] = {}
    sources: dict[str, list[str]] = {}
    for row in plan.group_by(names, use_threads=False).aggregate([([], "count_all")]).to_pylist():
        name = f"{row['split']}-{shard_name(row['shard'])}"
        rows[name] = rows.get(name, 0) + row["count_all"]
        sources.setdefault(name, []).append(row["raw"])
    return [Shard(name, rows[name], (split.FILE, *_files(aligned, sorted(sources[name])))) for name in sorted(rows)]


def _files(aligned: Aligned, raw: list[str]) -> tuple[str, ...]:
    """All files that raw shards' pictures, numbers and list rows lie in; rows fetched again are all over the list."""
    recorded = recorded_outputs(aligned.data)
    lists = [path for path in sorted(recorded) if path.startswith("urls/") and path.endswith(".parquet")]
    found: dict[str, None] = {}
    for name in raw:
        own = f"urls/{name}.parquet"
        signals = [f"signals/{signal}/{name}.parquet" for signal in aligned.signals]
        files = [f"raw/{name}.tar", f"raw/{name}.parquet", *signals, *([own] if own in recorded else lists)]
        found |= dict.fromkeys(files)
    return tuple(found)


# --- columns --------------------------------------------------------------------------------------


def _columns(aligned: Aligned) -> dict[str, Column]:
    """What is read from `raw`, the signals and the list, by its name in the packed set.

    DuckDB does not tell `WIDTH` from `width`, so a list's column that differs only by case is renamed too.
    """
    found = aligned.columns
    columns = {name: found[name] for name in ("key", *TEXTS, *SIDES, *(n for n in FROM_RAW if n in found))}
    vectors = {name: column for name, column in found.items() if name in VECTORS}
    columns |= {name: c for name, c in found.items() if c.table not in ("raw", "urls")} | vectors
    taken = {name.lower() for name in (*columns, *PLACE, *VECTORS, "weight")}
    for column in (column for column in found.values() if column.table == "urls"):
        name = source_name(column.name.lower(), taken).removesuffix(column.name.lower()) + column.name
        columns[name] = column
        taken.add(name.lower())
    return {name: columns[name] for name in sorted(columns, key=lambda name: name in VECTORS)}


def _schema(data: DataDir, aligned: Aligned, columns: Mapping[str, Column]) -> pa.Schema:
    """One schema for all packed shards: a column that is null in one shard, or narrower, takes the others' type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = [pa.field(name, pa.string(), nullable=False) for name in ("key", *TEXTS)]
    first += [pa.field(name, pa.int32(), nullable=False) for name in SIDES]
    first += [pa.field(name, pa.int64(), nullable=False) for name in PLACE]
    first += [pa.field("weight", pa.float32(), nullable=False)]
    files = [path for path in _files(aligned, [marker.shard for marker in aligned.shards]) if path.endswith(".parquet")]
    folders: dict[str, list[pa.Schema]] = {}
    for path in files:
        read_parquet(data.root / path, [])
        folders.setdefault(path.rpartition("/")[0], []).append(pq.read_schema(data.root / path))
    kinds = {folder: _unified(folder, schemas) for folder, schemas in folders.items()}
    rest = [name for name in columns if name not in ("key", *TEXTS, *SIDES)]
    return pa.schema([*first, *(pa.field(name, kinds[_folder(columns[name])][columns[name].name]) for name in rest)])


def _folder(column: Column) -> str:
    return column.table if column.table in ("raw", "urls") else f"signals/{column.table}"


def _unified(folder: str, schemas: list[pa.Schema]) -> dict[str, pa.DataType]:
    import pyarrow as pa

    try:
        schema = pa.unify_schemas([one.remove_metadata() for one in schemas], promote_options="permissive")
    except pa.ArrowException as error:
        message = f"the shards of {folder}/ do not have the same columns: {str(error).splitlines()[0]}"
        raise HeadraceError(message, hint="run the stage that wrote them again", code=MISSING) from None
    return {field.name: _plain(field.type) for field in schema}


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values where they are dictionary-encoded; text where nothing but nulls is known."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.string()
    return kind.value_type if pa.types.is_dictionary(kind) else kind


# --- one output shard -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pack:
    """Writes one packed shard: the tar, then the Parquet beside it.

    `schema` is in Arrow's own form: pickled on its way to a worker it would lose the names inside lists, and the bytes
    would depend on the number of workers.
    """

    data: DataDir
    aligned: Aligned
    columns: Mapping[str, Column]
    schema: bytes

    def __call__(self, shard: Shard) -> dict[str, Part]:
        import pyarrow as pa

        (self.data.curated / NAME).unlink(missing_ok=True)
        name, _, number = shard.name.partition("-")
        tar = f"curated/{name}/{number}.tar"
        tables, fates = [], Counter[str]()
        with atomic_path(self.data.root / tar) as temporary, temporary.open("wb") as file:
            writer = TarWriter(file)
            for raw, rows in self._plan(name, int(number)).items():
                table, extensions = self._copy(raw, rows, writer)
                tables.append(table)
                fates.update(name if extension == "jpg" else f"{name}:{extension}" for extension in extensions)
            writer.close()
        parquet = tar.removesuffix("tar") + "parquet"
        write_parquet(pa.concat_tables(tables), self.data.root / parquet)
        return {"pack": Part(fates, (tar, parquet))}

    def _plan(self, name: str, number: int) -> dict[str, list[int]]:
        """The rows of this shard by raw shard, in order."""
        import pyarrow.parquet as pq

        chosen = [("split", "=", name), ("shard", "=", number)]
        table = pq.read_table(self.data.root / split.FILE, columns=["raw", "row"], filters=chosen, partitioning=None)
        rows: dict[str, list[int]] = {}
        for raw, row in zip(table["raw"].to_pylist(), table["row"].to_pylist(), strict=True):
            rows.setdefault(raw, []).append(row)
        return rows

    def _copy(self, raw: str, rows: list[int], writer: TarWriter) -> tuple[pa.Table, list[str]]:
        """Append the samples of one raw shard to the tar; returns their rows and their pictures' extensions."""
        import pyarrow as pa

        schema = pa.ipc.read_schema(pa.py_buffer(self.schema))
        marker = next(marker for marker in self.aligned.shards if marker.shard == raw)
        table = self.aligned.read(marker, dict(self.columns)).take(rows)
        path = self.data.raw / f"{raw}.tar"
        facts = [_facts(row) for row in table.select([*TEXTS, *SIDES]).to_pylist()]
        keys = table["key"].to_pylist()
        samples = read_tar(path, frozenset(keys))
        places = [_add(writer, _sample(samples, key, path), fact) for key, fact in zip(keys, facts, strict=True)]
        made = {"key": keys, **{name: [fact[name] for fact in facts] for name in (*TEXTS, *SIDES)}}
        made |= {"offset": [place.offset for place in places], "length": [place.length for place in places]}
        weight = _weights(table[self._weight] if self._weight else None, len(keys))
        arrays = [made.get(field.name, weight if field.name == "weight" else None) for field in schema]
        columns = [
            pa.array(array, field.type) if array is not None else table[field.name].cast(field.type)
            for array, field in zip(arrays, schema, strict=True)
        ]
        return pa.table(columns, schema=schema), [split_name(place.name)[1] for place in places]

    @property
    def _weight(self) -> str | None:
        own = Column("urls", "weight")
        return next((name for name, column in self.columns.items() if column == own), None)


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What KEY.json says: the same keys and types in every sample, never null."""
    return {name: row[name] or "" for name in TEXTS} | {name: int(row[name] or 0) for name in SIDES}


def _sample(samples: Iterator[Sample], key: str, path: Path) -> Sample:
    """The next sample, which must be `key`'s and have a picture."""
    sample = next(samples, None)
    if sample is None or sample.key != key or sample.image() is None:
        hint = "run `curate download` or `curate ingest` again"
        raise HeadraceError(f"{path} has no picture for {key} where its table has one", hint=hint, code=MISSING)
    return sample


def _add(writer: TarWriter, sample: Sample, facts: Mapping[str, Any]) -> Member:
    """Append picture, caption and facts; returns where the picture's bytes lie."""
    extension = next(extension for extension in IMAGE_EXTENSIONS if extension in sample.files)
    name = "jpg" if extension == "jpeg" else extension
    place = writer.add(f"{sample.key}.{name}", sample.files[extension])
    writer.add(f"{sample.key}.txt", str(facts["caption"]).encode("utf-8", "surrogatepass"))
    writer.add(f"{sample.key}.json", canonical_json(facts))
    return place


def _weights(column: pa.ChunkedArray | None, rows: int) -> list[float]:
    """A list's own `weight` where it is a number of at least 0; else 1."""
    import pyarrow as pa

    if column is None or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return [1.0] * rows
    import numpy as np

    values = np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float32)
    return [float(value) if np.isfinite(value) and value >= 0 else 1.0 for value in values]
