"""`curate query`: how the answer to an SQL question leaves, as a table for a person, as JSON lines, or as a file.

Rows come as a stream and are never held whole. Captions are hostile text: on a terminal control characters are spelled
out, and in CSV a cell that a spreadsheet would run as a formula gets an apostrophe in front. What may be asked, and of
which tables, is `tables`'.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.base import HeadraceError, atomic_path, visible
from pipeline.page.plaintext import harmless_cell
from pipeline.shards import DataDir

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 50  # rows and characters of a cell that a person is shown
CELL = 48
ITEMS = 4  # values of a list that a person is shown


def run(data: DataDir, sql: str, out: Path | None, as_json: bool) -> None:
    """Ask, and print the answer; or write it to `out` (.parquet, .csv or .jsonl) and say how many rows it has."""
    from pipeline import tables

    write = None if out is None else writer(out)
    reader = tables.query(data, sql)
    if out is not None and write is not None:
        rows = write(reader, out)
        print(json.dumps({"rows": rows, "path": str(out)}) if as_json else f"{rows:,} rows written to {out}")
    elif as_json:
        for line in json_lines(reader, ascii_only=sys.stdout.isatty()):
            print(line)
    else:
        print(text(reader, shutil.get_terminal_size((160, 24)).columns))


# --- files --------------------------------------------------------------------------------------------

Write = Callable[["pa.RecordBatchReader", Path], int]


def writer(path: Path) -> Write:
    """The function that writes a file of this kind, atomically, and returns its rows."""
    kinds: dict[str, Write] = {".parquet": write_parquet, ".csv": write_csv, ".jsonl": write_jsonl}
    try:
        return kinds[path.suffix.lower()]
    except KeyError:
        message = f"--out {path} is of no known kind"
        raise HeadraceError(message, hint="end its name in .parquet, .csv or .jsonl") from None


def write_parquet(reader: pa.RecordBatchReader, path: Path) -> int:
    """The answer with its types as zstd Parquet."""
    import pyarrow.parquet as pq

    rows = 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, reader.schema, compression="zstd") as file:
        for batch in reader:
            file.write_batch(batch)
            rows += batch.num_rows
    return rows


def write_csv(reader: pa.RecordBatchReader, path: Path) -> int:
    """The answer as CSV with a header; text that a spreadsheet would take for a formula is made harmless."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        return _csv(reader, file)


def _csv(reader: pa.RecordBatchReader, file: IO[str]) -> int:
    lines, rows = csv.writer(file, lineterminator="\n"), 0
    lines.writerow([harmless_cell(name) for name in reader.schema.names])
    for row in _rows(reader):
        lines.writerow([_csv_cell(value) for value in row])
        rows += 1
    return rows


def write_jsonl(reader: pa.RecordBatchReader, path: Path) -> int:
    """The answer as one JSON object per line."""
    rows = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for rows, line in enumerate(json_lines(reader), start=1):  # noqa: B007
            file.write(line + "\n")
    return rows


def json_lines(reader: pa.RecordBatchReader, ascii_only: bool = False) -> Iterator[str]:
    """One JSON object per row. What JSON has no form for: infinite and NaN are null, bytes hex, times ISO 8601."""
    names = unique(reader.schema.names)
    for row in _rows(reader):
        yield json.dumps(dict(zip(names, map(plain, row), strict=True)), ensure_ascii=ascii_only)


def _rows(reader: pa.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    for batch in reader:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def unique(names: Sequence[str]) -> list[str]:
    """Column names with a number behind those that come again."""
    out: list[str] = []
    for name in names:
        out.append(next(n for i in range(len(names) + 1) if (n := f"{name}_{i}" if i else name) not in out))
    return out


def plain(value: Any) -> Any:
    """An Arrow value as JSON has it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _csv_cell(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return harmless_cell(value) if isinstance(value, str) else value


# --- for a person -------------------------------------------------------------------------------------


def text(reader: pa.RecordBatchReader, width: int) -> str:
    """The first rows as an aligned table no wider than `width` columns; a last line says what was left out."""
    from rich.cells import cell_len

    rows = list(islice(_rows(reader), ROWS + 1))
    shown, names = rows[:ROWS], reader.schema.names
    columns = [[visible(name, CELL), *(_cell(row[i]) for row in shown)] for i, name in enumerate(names)]
    numeric = [all(isinstance(row[i], int | float) or row[i] is None for row in shown) for i in range(len(names))]
    widths = [max(map(cell_len, column)) for column in columns]
    fitting = max(1, sum(sum(widths[: i + 1]) + 2 * i <= width for i in range(len(widths))))
    lines = []
    for r in range(len(shown) + 1):
        cells = []
        for column, size, right in list(zip(columns, widths, numeric, strict=True))[:fitting]:
            space = " " * (size - cell_len(column[r]))
            cells.append(space + column[r] if right else column[r] + space)
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_left_out(len(rows), [visible(name, CELL) for name in names[fitting:]])])


def _left_out(rows: int, names: list[str]) -> list[str]:
    out = (
        [f"({min(rows, ROWS)} rows)"] if rows <= ROWS else [f"(the first {ROWS} rows; --out FILE or --json gives all)"]
    )
    if names:
        more = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        out.append(f"(columns that do not fit: {more})")
    return out


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        more = f", … {len(value)} values" if len(value) > ITEMS else ""
        return f"[{', '.join(_cell(item) for item in value[:ITEMS])}{more}]"
    value = plain(value)
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), CELL)
