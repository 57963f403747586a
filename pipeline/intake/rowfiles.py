"""Tables as people keep them (.parquet, .csv, .tsv, .json, .jsonl, .txt, also .gz and .zst) as batches of rows.

Nothing is lost and nothing stops a list for one bad row: bytes that are not UTF-8 become U+FFFD, a row that does not
fit its table comes out marked as malformed. It does not know what the columns mean.

- .csv: comma (or tab, semicolon, bar where the header has no comma), RFC 4180 quotes, newlines inside quotes allowed.
- .tsv: a line is a row; quotes around a cell are taken off only when those inside are doubled, since captions hold
  bare quotes. Tables without header are known by a URL in their first row (CC3M, CC12M).
- .json: an array of objects, or as .jsonl: an object per line. .txt: a URL per line, blank lines are none.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError
from pipeline.intake.coltypes import clean, column_of, narrowest, plain
from pipeline.shards import source_name

if TYPE_CHECKING:
    import pyarrow as pa

FORMS = ("parquet", "csv", "tsv", "json", "jsonl", "ndjson", "txt")
BATCH_ROWS, BATCH_BYTES = 65_536, 32 << 20
MAX_CELL = 16 << 20  # a quoted cell longer than this is a quote that was never closed
LOOK_AHEAD = 100  # rows looked at to tell the columns of a table without header

_URL = re.compile(r"\s*([a-z][a-z0-9+.-]*:)?//[^\s/]|\s*www\.\w", re.IGNORECASE)


@dataclass(frozen=True)
class Batch:
    """Some rows. `types` are what the values could be (text columns of numbers), `malformed` marks unusable rows."""

    rows: pa.RecordBatch
    types: pa.Schema
    malformed: pa.BooleanArray


@dataclass(frozen=True)
class RowFile:
    """One file: the names of its columns, as far as its beginning tells, and its rows."""

    path: Path
    columns: tuple[str, ...]
    read: Callable[[], Iterator[Batch]]

    def batches(self) -> Iterator[Batch]:
        """The rows in order, in batches of bounded size; a file that breaks off is a `HeadraceError`."""
        with _sentences(self.path):
            yield from self.read()


class _sentences:
    """Turns what a broken file makes its reader say into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, FileNotFoundError):
            raise HeadraceError(f"there is no file {self.path}", hint="check the path", code=MISSING) from None
        if isinstance(error, PermissionError | IsADirectoryError):
            raise HeadraceError(f"{self.path} cannot be opened", hint="check what it is and its permissions") from None
        if isinstance(error, pa.ArrowException | OSError | EOFError | csv.Error | ValueError | MemoryError):
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise HeadraceError(f"{self.path} cannot be read: {why}", hint="mend the file or fetch it again") from None


def form_of(path: Path) -> str | None:
    """The form that a file's name tells, below a .gz or .zst; None for a file that is no table."""
    name = path.name.lower()
    form = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    return form if form in FORMS and (form != "parquet" or name.endswith("parquet")) else None


def open_rows(path: Path) -> RowFile:
    """Look at the beginning of a table; an unknown form, a missing or unreadable file is a `HeadraceError`."""
    form = form_of(path)
    if form is None:
        known = ", ".join(f".{name}" for name in FORMS)
        raise HeadraceError(
            f"{path} is no table that can be read", hint=f"known are {known}, those of text also .gz .zst"
        )
    with _sentences(path):
        if form == "parquet":
            return _open_parquet(path)
        if form in ("csv", "tsv", "txt"):
            return _open_cells(path, form)
        return _open_json(path)


# --- Parquet ---------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> RowFile:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = _distinct(file.schema_arrow.names)
    return RowFile(path, names, lambda: _parquet_batches(path, names))


def _parquet_batches(path: Path, names: tuple[str, ...]) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Read ahead, all of the file would be in memory by its end.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        heaviest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1.0)
        size = int(min(max(BATCH_BYTES / max(heaviest, 1.0), 16), BATCH_ROWS))
        for batch in file.iter_batches(batch_size=size):
            rows = pa.RecordBatch.from_arrays([plain(column) for column in batch.columns], names=list(names))
            yield Batch(rows, rows.schema, pa.repeat(False, len(rows)))


# --- CSV, TSV, TXT ---------------------------------------------------------------------------------


def _open_cells(path: Path, form: str) -> RowFile:
    delimiter = "," if form == "csv" else "\t"
    with _open_text(path) as file:
        first = file.readline(MAX_CELL)
    if form == "csv" and not _has_url([first]) and "," not in first:
        delimiter = next((other for other in "\t;|" if other in first), ",")

    def rows() -> Iterator[list[str]]:
        return _csv_rows(path, delimiter) if form == "csv" else _line_rows(path, form)

    head = list(itertools.islice(rows(), LOOK_AHEAD))
    if form == "txt":
        return RowFile(path, ("url",), lambda: _cell_batches(rows(), ("url",)))
    if not head or _has_url(head[0]):
        names = _guessed_names(head)
        return RowFile(path, names, lambda: _cell_batches(rows(), names))
    names = _distinct([name.strip() for name in head[0]])
    return RowFile(path, names, lambda: _cell_batches(itertools.islice(rows(), 1, None), names))


def _open_text(path: Path, newline: str = "") -> IO[str]:
    """A text file, decompressed by its name, UTF-8 unless a mark at its start says UTF-16."""
    import pyarrow as pa

    def binary() -> IO[bytes]:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix.lower() == ".zst":
            return io.BufferedReader(_Stream(pa.input_stream(str(path), compression="zstd")), 1 << 20)
        return path.open("rb")

    with binary() as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(binary(), encoding, errors="replace", newline=newline)


class _Stream(io.RawIOBase):
    """An Arrow input stream as Python's buffers want it."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _csv_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_CELL)
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        before, row = 0, []  # type: int, list[str]
        try:
            for row in reader:
                before = reader.line_num
                if row:
                    yield row
        except csv.Error as error:
            raise ValueError(f"a quote opened on line {before + 1:,} is not closed ({error})") from None


def _line_rows(path: Path, form: str) -> Iterator[list[str]]:
    with _open_text(path, newline="\n") as file:
        for line in file:
            text = line.rstrip("\r\n")
            if form == "txt":
                if text.strip():
                    yield [text.strip()]
            elif text:
                yield [_unquoted(cell) for cell in text.split("\t")] if '"' in text else text.split("\t")


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def _has_url(cells: Iterable[str]) -> bool:
    return any(_URL.match(cell) for cell in cells)


def _guessed_names(head: Sequence[list[str]]) -> tuple[str, ...]:
    """`url` and `caption` for the columns that look so, `column_N` (from 0) for the others."""
    if not head:
        return ()
    width = Counter(map(len, head)).most_common(1)[0][0]
    columns = list(zip(*(row for row in head if len(row) == width), strict=True))
    url = max(range(width), key=lambda i: sum(map(bool, map(_URL.match, columns[i]))))
    prose = [sum(len(c) for c in column if re.search(r"[^\W\d_]", c) and not _URL.match(c)) for column in columns]
    prose[url] = 0
    names = [f"column_{i}" for i in range(width)]
    if max(prose) > 0:
        names[prose.index(max(prose))] = "caption"
    names[url] = "url"
    return tuple(names)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Header names as column names: a blank one gets a number, a second of its name `source_…`."""
    taken: list[str] = []
    for i, name in enumerate(names):
        taken.append(source_name(name or f"column_{i}", taken))
    return tuple(taken)


def _cell_batches(rows: Iterator[list[str]], names: tuple[str, ...]) -> Iterator[Batch]:
    """Cells as text columns, empty ones null; a row too short ends in nulls, one too long is malformed."""
    import pyarrow as pa

    width = len(names)
    for chunk in _chunks(rows, lambda row: sum(map(len, row))):
        malformed = [len(row) > width for row in chunk]
        even = [row if len(row) == width else (row + [""] * width)[:width] for row in chunk]
        columns = [_without_empty(pa.array(cells, pa.string())) for cells in zip(*even, strict=True)]
        types = pa.schema(list(zip(names, map(narrowest, columns), strict=True)))
        yield Batch(pa.RecordBatch.from_arrays(columns, names=list(names)), types, pa.array(malformed))


def _without_empty(column: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _chunks(rows: Iterator[Any], weigh: Callable[[Any], int]) -> Iterator[list[Any]]:
    chunk, weight = [], 0  # type: list[Any], int
    for row in rows:
        chunk.append(row)
        weight += weigh(row)
        if len(chunk) >= BATCH_ROWS or weight >= BATCH_BYTES:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


# --- JSON ------------------------------------------------------------------------------------------


def _open_json(path: Path) -> RowFile:
    with _open_text(path) as file:
        array = re.match(r"\s*\[", file.read(4096)) is not None

    def rows() -> Iterator[Any]:
        return _array_rows(path) if array else _object_lines(path)

    head = list(itertools.islice(rows(), 1000))
    if head and not any(isinstance(row, dict) for row in head):
        raise ValueError("it holds no list of JSON objects, as an array or one per line")
    names = tuple(dict.fromkeys(name for row in head if isinstance(row, dict) for name in row))
    return RowFile(path, names, lambda: map(object_batch, _chunks(rows(), _weight)))


def _object_lines(path: Path) -> Iterator[Any]:
    with _open_text(path, newline="\n") as file:
        for line in file:
            if not line.isspace():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield None


def _array_rows(path: Path) -> Iterator[Any]:
    """The elements of one JSON array, without holding more than some of the text."""
    decoder, step = json.JSONDecoder(), 1 << 20
    with _open_text(path) as file:
        text, at, seen = file.read(step), 0, 0
        at = text.index("[") + 1
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, at)
                if end == len(text):  # a number might go on
                    raise ValueError
            except ValueError:
                more = file.read(max(step, len(text) - at))
                if not more or len(text) - at > 4 * MAX_CELL:
                    raise ValueError(f"the JSON array breaks off or is damaged after element {seen:,}") from None
                text, at = text[at:] + more, 0
                continue
            at, seen = end, seen + 1
            yield value


_BETWEEN = re.compile(r"[\s,]*")


def _skip(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return match.end() if match else at


def _weight(row: Any) -> int:
    return sum(len(v) if isinstance(v, str) else 16 for v in row.values()) if isinstance(row, dict) else 16


def object_batch(rows: Sequence[Any]) -> Batch:
    """Dicts as columns of the types that their values have; values that no type holds together become JSON text."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    objects = [row if isinstance(row, dict) else {} for row in rows]
    columns = [column_of([row.get(name) for row in objects]) for name in names]
    malformed = pa.array([not isinstance(row, dict) for row in rows], pa.bool_())
    table = pa.RecordBatch.from_arrays(columns, names=list(_distinct([clean(name) for name in names])))
    if not names:
        table = pa.RecordBatch.from_arrays([pa.nulls(len(rows))], names=["url"])
    return Batch(table, table.schema, malformed)
