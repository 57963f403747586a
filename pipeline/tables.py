"""DuckDB over the tables of a data folder, locked: one SELECT in, Arrow out, and no way to a file or the network.

The views are `urls`, `raw`, `signals` (all of them joined on key), `decisions` and `curated`. Each is registered as a
pyarrow dataset; DuckDB itself may open nothing (`enable_external_access=false`), cannot be told otherwise
(`lock_configuration=true`), and a statement's syntax tree is checked before it runs. It knows nothing of stages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError, atomic_path
from pipeline.fates import verdicts
from pipeline.shards import DataDir, made_by, shard_files

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

VIEWS = {"urls": "download", "raw": "download", "signals": "score", "decisions": "filter", "curated": "pack"}
MEMORY = "4GB"
BATCH_ROWS = 10_000
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree", "repeat"})
SELECT_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
ALLOWED = "give one SELECT over urls, raw, signals, decisions and curated"


def query(data: DataDir, sql: str, memory: str = MEMORY, threads: int | None = None) -> pa.RecordBatchReader:
    """Run one SELECT over the folder's views; rows come as a stream. Half-precision vectors come as float32.

    Raises:
        HeadraceError: for anything but one SELECT (code 2), for SQL that DuckDB cannot bind or run (code 2), and for a
            view whose stage has not run (code 3). While the stream is read, too.
    """
    import pyarrow as pa

    connection = connect(memory, threads)
    check_select(connection, sql)
    _register(connection, data, _named_views(connection, sql))
    with sql_errors():
        reader = connection.sql(_bare(sql)).to_arrow_reader(BATCH_ROWS)

    def batches() -> Iterator[pa.RecordBatch]:
        with sql_errors():
            yield from reader
        connection.close()

    return pa.RecordBatchReader.from_batches(reader.schema, batches())


def connect(memory: str = MEMORY, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory that can reach no file, no network and no Python variable, and whose settings are locked."""
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "python_enable_replacements": "false",
        "temp_directory": "",
        "memory_limit": memory,
    }
    if threads is not None:
        settings["threads"] = str(threads)
    try:
        connection = duckdb.connect(":memory:", config=settings)
    except duckdb.Error as error:
        raise HeadraceError(f"DuckDB refuses its settings: {_sentence(error)}", hint="such as `4GB`") from None
    connection.execute("SET lock_configuration=true").fetchall()
    return connection


def check_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse anything but a single SELECT that reads nothing besides tables: `HeadraceError` with one sentence."""
    import duckdb

    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise HeadraceError(f"the SQL cannot be parsed: {_sentence(error)}", hint=ALLOWED) from None
    if len(statements) != 1:
        raise HeadraceError(f"one SELECT is wanted, not {len(statements)} statements", hint=ALLOWED)
    kind = statements[0].type.name
    if kind != "SELECT":
        raise HeadraceError(f"only SELECT may run here, not {kind}", hint=ALLOWED)
    for node in walk(syntax_tree(connection, sql)):
        _check_node(node)


def _check_node(node: dict[str, Any]) -> None:
    kind = str(node.get("type", ""))
    if kind.endswith("_NODE") and kind not in SELECT_NODES:
        raise HeadraceError(f"only SELECT may run here, not {kind.split('_')[0]}", hint=ALLOWED)
    if kind == "TABLE_FUNCTION":
        name = str(node.get("function", {}).get("function_name", "")).lower()
        if name not in TABLE_FUNCTIONS:
            raise HeadraceError(f"the function {name} may not be read from here", hint=ALLOWED)


def syntax_tree(connection: duckdb.DuckDBPyConnection, sql: str, what: str = "the SQL", hint: str = ALLOWED) -> Any:
    """DuckDB's own parse of one SELECT, as nested dicts and lists; what it cannot parse is a `HeadraceError`."""
    with sql_errors(what):
        rows = connection.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()
    try:
        tree = json.loads(rows[0][0])
    except RecursionError:
        raise HeadraceError(f"{what} is nested too deeply", hint="write it flatter") from None
    if tree.get("error") or len(tree.get("statements", ())) != 1:
        message = re.sub(r"\s+", " ", str(tree.get("error_message", "it is not one SELECT")))
        raise HeadraceError(f"{what} cannot be parsed: {message}", hint=hint)
    return tree["statements"][0]


def walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every dict inside nested dicts and lists."""
    rest = [tree]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield value
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


@contextmanager
def sql_errors(what: str = "the SQL") -> Iterator[None]:
    """Turn DuckDB's errors into a sentence that names `what`."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise HeadraceError(f"{what} needs more memory: {_sentence(error)}", hint="ask for fewer rows") from None
    except duckdb.Error as error:
        raise HeadraceError(f"{what} cannot run: {_sentence(error)}", hint="check names and types") from None


def _sentence(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).split("\nLINE ")[0]).strip()


def _bare(sql: str) -> str:
    return sql.strip().rstrip(";")


# --- the views ------------------------------------------------------------------------------------


def _named_views(connection: duckdb.DuckDBPyConnection, sql: str) -> list[str]:
    """The views a SELECT reads; all there can be when it names none (SHOW TABLES)."""
    tables = (node for node in walk(syntax_tree(connection, sql)) if node.get("type") == "BASE_TABLE")
    names = {str(node["table_name"]).lower() for node in tables}
    return [view for view in VIEWS if view in names]


def _register(connection: duckdb.DuckDBPyConnection, data: DataDir, views: list[str]) -> None:
    for view in views or VIEWS:
        files = _files(data, view)
        if not files and views:
            message = f"there is no table {view} in {data.root} yet"
            raise HeadraceError(message, hint=f"run `curate {VIEWS[view]}` first", code=MISSING)
        if view == "signals":
            _register_signals(connection, files)
        elif files:
            connection.register(view, arrow_dataset(files[""]))


def _files(data: DataDir, view: str) -> dict[str, list[Path]]:
    """The Parquet files behind a view, by signal (by the empty name for the other views)."""
    if view == "signals":
        folders = sorted(folder for folder in data.signals.glob("*") if folder.is_dir())
        return {folder.name: files for folder in folders if (files := shard_files(folder, "parquet"))}
    if view == "decisions":
        files = [path] if (path := verdicts(data)) else []
    elif view == "curated":
        files = [path for split in ("train", "val") for path in shard_files(data.curated / split, "parquet")]
    else:
        files = shard_files(data.root / view, "parquet")
    return {"": files} if files else {}


def _register_signals(connection: duckdb.DuckDBPyConnection, files: dict[str, list[Path]]) -> None:
    """One view over all signals; a column that two of them have gets its signal's name in front."""
    taken = {"key"}
    selected, joined = ["key"], ""
    for signal, paths in files.items():
        dataset, table = arrow_dataset(paths), f"signal_{signal}"
        connection.register(table, dataset)
        for column in dataset.schema.names:
            if column != "key":
                name = signal_column(signal, column, taken)
                taken.add(name)
                selected.append(f"{quoted(table)}.{quoted(column)} AS {quoted(name)}")
        joined += f" FULL JOIN {quoted(table)} USING (key)" if joined else f" FROM {quoted(table)}"
    if files:
        connection.execute(f"CREATE VIEW signals AS SELECT {', '.join(selected)}{joined}").fetchall()


def signal_column(signal: str, column: str, taken: Iterable[str]) -> str:
    """The name under which a signal's column joins a table: its own, or with the signal's in front."""
    return f"{signal}_{column}" if column in taken else column


def arrow_dataset(files: list[Path]) -> Any:
    """A pyarrow dataset over Parquet files whose columns may differ; half floats become float32 (DuckDB has none)."""
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    schemas, path = [], files[0]
    try:
        for path in files:
            schemas.append(pq.read_schema(path))
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowException, OSError) as error:
        raise HeadraceError(f"{path} cannot be read: {_sentence(error)}", hint=made_by(path), code=MISSING) from None
    schema = pa.schema([(field.name, single(field.type)) for field in schema])
    return ds.dataset([str(path) for path in files], schema=schema, format="parquet", partitioning=None)


def single(kind: pa.DataType) -> pa.DataType:
    """A type with its half floats, also those in lists, made float32."""
    import pyarrow as pa

    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(single(kind.value_type), kind.list_size)
    return pa.list_(single(kind.value_type)) if pa.types.is_list(kind) else kind


def widened(table: pa.Table) -> pa.Table:
    """A table with its half floats made float32, as DuckDB wants it."""
    import pyarrow as pa

    kinds = [single(field.type) for field in table.schema]
    if kinds == table.schema.types:
        return table
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def write_stream(batches: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write tables of one schema, one after the other, as one Parquet file, atomically."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(batch, row_group_size=100_000)
