"""The on-disk format: where a data folder keeps what, tars and their index, Parquet files.

It knows nothing of stages. Tars are plain ustar with fixed owner, mode and time, so equal members give equal bytes;
they are read by walking the headers, members in memory, and nothing is ever extracted or unpickled.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipeline.base import MISSING, HeadraceError, atomic_path

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT_VERSION = 1
BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class DataDir:
    """The places inside one `--data` folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def urls(self) -> Path:
        return self.root / "urls"

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def signals(self) -> Path:
        return self.root / "signals"

    @property
    def decisions(self) -> Path:
        return self.root / "decisions"

    @property
    def curated(self) -> Path:
        return self.root / "curated"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def markers(self) -> Path:
        return self.root / ".markers"


def shard_name(index: int) -> str:
    """The five-digit name of a shard, as img2dataset writes it."""
    return f"{index:05d}"


def shard_files(folder: Path, extension: str) -> list[Path]:
    """The shards of `folder` with this extension, in order; strange names are left out."""
    return sorted(path for path in folder.glob(f"*.{extension}") if path.stem.isdigit())


_MAKERS = {
    "urls": "`curate download` (or `curate ingest`) with the same list",
    "raw": "`curate download` (or `curate ingest`) with the same list",
    "signals": "`curate score`",
    "decisions": "`curate filter`, then `curate dedup`",
    "curated": "`curate pack`",
}


def made_by(path: Path) -> str:
    """A hint: the command that makes a file of a data folder anew where it is missing or damaged."""
    maker = next((_MAKERS[part] for part in reversed(path.parts) if part in _MAKERS), "the stage that writes it")
    return f"run {maker} again: it makes what is missing or damaged anew and keeps the rest"


def rows_to_fetch(path: Path, columns: list[str]) -> pa.Table:
    """The rows of a shard of `urls/` that have no fate yet, those columns of them: the rows of the raw shard."""
    table = read_parquet(path, [*columns, "fate"])
    return table.filter(table["fate"].is_null()).select(columns)


def raw_fate(status: str, error: str | None) -> str | None:
    """Why a raw row has no picture, `fetch:code` or `image:code`; None where it has one."""
    if status == "success":
        return None
    code = (error or "other").partition(":")[0]
    return f"image:{code}" if status == "failed_to_resize" else f"fetch:{code}"


def source_name(name: str, taken: Container[str]) -> str:
    """The name under which an input's column joins a table: its own, or `source_…` where that is taken."""
    while name in taken:
        name = f"source_{name}"
    return name


class Member(NamedTuple):
    """One file inside a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


class Sample(NamedTuple):
    """The members that share a key: `files` maps extension to bytes, in tar order."""

    key: str
    files: dict[str, bytes]

    def image(self) -> bytes | None:
        """The bytes of the sample's picture, None where it has none."""
        return next((self.files[ext] for ext in IMAGE_EXTENSIONS if ext in self.files), None)


def tar_members(path: Path) -> list[Member]:
    """The regular members of a ustar file, in order, from its headers alone.

    Links, devices and folders are passed over. GNU and PAX long names and sizes are followed. A file that ends inside
    a member, or without the closing zero block, is a `HeadraceError`.
    """
    with path.open("rb") as file:
        return list(_walk(file, path))


def _walk(file: IO[bytes], path: Path) -> Iterator[Member]:
    size = file.seek(0, 2)
    offset, override = 0, {}  # type: int, dict[str, str]
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) == BLOCK and not any(header):
            return
        name, length, kind = _parse_header(header, offset, path)
        length = int(override.get("size", length))
        start, offset = offset + BLOCK, offset + BLOCK + -(-length // BLOCK) * BLOCK
        if start + length > size:
            raise _damaged(path, f"member {name!r} is cut short")
        if kind in b"Lxg":
            override |= _extended(kind, file.read(length)) if kind != b"g" else {}
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(override.get("path", name), start, length)
        override = {}


def _parse_header(header: bytes, offset: int, path: Path) -> tuple[str, int, bytes]:
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        if len(header) < BLOCK or checksum != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        length = _number(header[124:136])
        name, prefix = _text(header[:100]), _text(header[345:500])
    except (ValueError, IndexError):
        raise _damaged(path, f"no tar header at byte {offset}") from None
    return (f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name), length, header[156:157]


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or big-endian binary behind a first byte of 0x80 (GNU, above 8 GB)."""
    return int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    if kind == b"L":
        return {"path": data.rstrip(b"\0").decode("utf-8", "replace")}
    fields, rest = {}, data
    while rest:
        length = int(rest.split(b" ", 1)[0])
        name, _, value = rest[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        fields[name.decode()] = value.decode("utf-8", "replace")
        rest = rest[length:]
    return fields


def _damaged(path: Path, why: str) -> HeadraceError:
    return HeadraceError(f"{path} is damaged: {why}", hint=made_by(path), code=MISSING)


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-cased extension of a member, split at the first dot of its base name (webdataset's rule)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def read_tar(path: Path, keys: frozenset[str] | None = None) -> Iterator[Sample]:
    """The samples of a tar in order (of `keys` only, if given): consecutive members that share a key."""
    members = tar_members(path)
    with path.open("rb") as file:
        key, files = None, {}  # type: str | None, dict[str, bytes]
        for member in members:
            this, extension = split_name(member.name)
            if this != key:
                if key is not None and files:
                    yield Sample(key, files)
                key, files = this, {}
            if keys is None or this in keys:
                file.seek(member.offset)
                files[extension] = file.read(member.length)
        if key is not None and files:
            yield Sample(key, files)


class TarWriter:
    """Writes a deterministic ustar file to an open binary file; `add` returns where the bytes lie."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, name: str, data: bytes) -> Member:
        """Append one member: mode 0444, owner 0, time 0."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o444
        start = self._file.tell() + BLOCK
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._file.write(data)
        self._file.write(b"\0" * (-len(data) % BLOCK))
        return Member(name, start, len(data))

    def close(self) -> None:
        """Write the closing blocks; the file itself stays open."""
        self._file.write(b"\0" * (2 * BLOCK))


def write_parquet(table: pa.Table, path: Path, row_group_size: int = 10_000) -> None:
    """Write a table atomically as zstd Parquet; equal tables give equal bytes."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=row_group_size)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file we wrote, or some of its columns; a missing or damaged one is a `HeadraceError`."""
    import pyarrow.parquet as pq

    with _sound_parquet(path):
        return pq.read_table(path, columns=None if columns is None else list(columns), partitioning=None)


def parquet_file(path: Path) -> pq.ParquetFile:
    """A Parquet file we wrote, of which only the footer is read; errors as in `read_parquet`."""
    import pyarrow.parquet as pq

    with _sound_parquet(path):
        return pq.ParquetFile(path)


@contextmanager
def _sound_parquet(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise HeadraceError(f"{path} is missing", hint=made_by(path), code=MISSING) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def vectors(column: pa.ChunkedArray | pa.Array) -> Any:
    """A fixed-size-list column as one array, shape (rows, dimension); rows that are null become zeros."""
    import numpy as np
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.list_size
    out = np.zeros((len(array), width), dtype=array.type.value_type.to_pandas_dtype())
    valid = np.asarray(array.is_valid())
    out[valid] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return out


def vector_column(values: Any, valid: Any) -> pa.Array:
    """An array of shape (rows, dimension) as a fixed-size-list column of float16, null where not `valid`."""
    import numpy as np
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    mask = pa.array(~np.asarray(valid, dtype=bool))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


def canonical_json(value: Any) -> bytes:
    """JSON for a tar member: the keys in the order given, no spaces to spare, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
