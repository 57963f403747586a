"""What people have on disk as pictures with captions: folders, WebDataset tars, img2dataset outputs, captions tables.

It tells the forms apart and joins tables to pictures; single pictures are `entries`' business.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.base import MISSING, HeadraceError, digest, file_sha256
from pipeline.intake.coltypes import unified
from pipeline.intake.entries import (
    PICTURES,
    Entry,
    as_name,
    first_caption,
    folder_entries,
    folders,
    inside,
    tar_entries,
)
from pipeline.intake.lists import CAPTION_NAMES, find_column, find_files
from pipeline.intake.rowfiles import form_of, open_rows

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_STEMS, TABLE_FORMS = ("metadata", "captions"), ("parquet", "csv", "tsv", "jsonl")  # taken without being asked for
PATH_NAMES = ("file_name", "path", "filename", "file", "filepath", "file_path", "image_path", "image", "img", "key")
CHUNK = 20_000
ROW_BYTES, TAR_SHARE = 500, 20  # about the text of a picture, about the share of text in a tar


Chunk = tuple["pa.Table | None", list[Entry]]


@dataclass(frozen=True)
class Source:
    """A folder or tars: `root` is what files are relative to; `pictures` counts the loose ones.

    `alone` says that the source is one tar, so that paths are those within it.

    `listing` is a digest of all names and sizes, `expected_bytes` about how much text there is to order.
    """

    root: Path
    tars: tuple[Path, ...]
    tables: tuple[Path, ...]
    pictures: int
    listing: str
    expected_bytes: int
    alone: bool = False

    def fingerprint(self) -> str:
        """A digest of every file's name and size, and of the tables' contents; a picture changed in place is missed."""
        return digest([self.listing, [file_sha256(path) for path in self.tables]])

    def chunks(self) -> Iterator[Chunk]:
        """All pictures, in the order of their names, some thousand at a time, and the table that speaks of them."""
        alike = [tar for tar in self.tars if img2dataset_table(tar)]
        if not alike:
            yield from _with_table(self)
            return
        for tar in self.tars:
            yield from (
                _img2dataset(self.root, tar)
                if tar in alike
                else _chunked(None, tar_entries(self.root, tar, self.alone))
            )


def open_source(source: str | Path, captions: str | Path | None = None) -> Source:
    """Look at what SOURCE is: a folder, a tar, or a glob of tars; `captions` is a table to use.

    One that is missing or holds no pictures has exit code 3.
    """
    path = Path(source)
    if path.is_dir():
        found = _walk(path.resolve())
    else:
        tars = [tar.resolve() for tar in find_files(source)]
        if strange := [tar for tar in tars if tar.suffix.lower() != ".tar"]:
            message = f"{strange[0]} is neither a folder nor a tar"
            raise HeadraceError(message, hint="a list of URLs is for `curate download`; name a folder or .tar files")
        root = Path(os.path.commonpath([tar.parent for tar in tars]))
        sizes = [tar.stat().st_size for tar in tars]
        listing = digest([[as_name(tar.relative_to(root)), size] for tar, size in zip(tars, sizes, strict=True)])
        found = Source(root, tuple(tars), (), 0, listing, sum(sizes) // TAR_SHARE, alone=path.is_file())
    if found.pictures and found.tars:
        message = f"{path} holds both loose pictures and tars ({found.tars[0].name})"
        raise HeadraceError(
            message, hint="ingest one of them: name the folder with the pictures, or the tars by a glob"
        )
    if not found.pictures and not found.tars:
        message = f"{path} holds no pictures ({', '.join(PICTURES[:6])}, ...) and no tars"
        raise HeadraceError(message, hint="name the folder that holds them", code=MISSING)
    if captions is None:
        return found
    return replace(found, tables=tuple(find_files(captions)))


def _walk(root: Path) -> Source:
    tars, tables, pictures, volume, listing = [], [], 0, 0, hashlib.sha256()
    for folder, names in folders(root):
        for name in names:
            path, kind = folder / name, Path(name).suffix.lower()[1:]
            size = path.lstat().st_size
            pictures += kind in PICTURES
            if kind == "tar":
                tars.append(_followed(root, path))
                volume += size // TAR_SHARE
            elif form_of(path) in TABLE_FORMS and name.lower().partition(".")[0] in TABLE_STEMS:
                tables.append(_followed(root, path))
            listing.update(f"{as_name(path.relative_to(root))}\0{size}\0".encode())
    return Source(root, tuple(tars), tuple(tables), pictures, listing.hexdigest(), volume + pictures * ROW_BYTES)


def _followed(root: Path, path: Path) -> Path:
    if inside(root, path) is None:
        message = f"{path} is a link that leads out of {root}"
        raise HeadraceError(message, hint="links out of the source are not followed: name the files themselves")
    return path


def _chunked(table: pa.Table | None, entries: Iterator[Entry]) -> Iterator[Chunk]:
    while chunk := list(itertools.islice(entries, CHUNK)):
        yield table, chunk


def _all_tars(source: Source) -> Iterator[Entry]:
    for tar in source.tars:
        yield from tar_entries(source.root, tar, source.alone)


# --- a table of captions -----------------------------------------------------------------------------


def _with_table(source: Source) -> Iterator[Chunk]:
    """Pictures of a folder or of tars, each row of the captions tables with its picture; the unmatched rows last."""
    entries = folder_entries(source.root) if source.pictures else _all_tars(source)
    if not source.tables:
        yield from _chunked(None, entries)
        return
    table, rows, said = _read_tables(source)
    seen: set[int] = set()
    yield from _chunked(table, _joined(entries, rows, said, seen))
    if not seen:
        names = ", ".join(path.name for path in source.tables)
        message = f"no path in {names} names a picture in {source.root}, for instance {next(iter(rows), 'none')!r}"
        raise HeadraceError(message, hint="its paths must be relative to SOURCE or to the table's own folder")
    missing = ((path, row) for path, numbers in rows.items() for row in numbers if row not in seen)
    lost = (Entry(path, path, caption=said[row], row=row, error="missing_file") for path, row in missing)
    yield from _chunked(table, lost)


def _joined(
    entries: Iterator[Entry], rows: dict[str, list[int]], said: Sequence[str | None], seen: set[int]
) -> Iterator[Entry]:
    for entry in entries:
        names = [entry.path]
        if entry.offset is not None:  # a member, which the table may name alone or from the tar's folder
            member = os.path.normpath(entry.path.removeprefix(f"{entry.file}/"))
            names += [member, (PurePosixPath(entry.file).parent / member).as_posix()]
        numbers = next((rows[name] for name in names if name in rows), [])
        seen.update(numbers)
        for row in numbers:
            yield replace(entry, row=row, caption=said[row] or entry.caption)
        if not numbers:
            yield entry


def _read_tables(source: Source) -> tuple[pa.Table, dict[str, list[int]], list[str | None]]:
    """All captions tables as one, its rows by picture (path relative to the source), and their captions."""
    paths: list[str | None] = []
    said: list[str | None] = []
    batches, types = [], []
    for file in map(open_rows, source.tables):
        path_col = find_column([file], None, PATH_NAMES, "", "paths")
        if path_col is None:
            names = ", ".join(f"`{name}`" for name in file.columns)
            message = f"{file.path}: no column names the pictures; its columns are {names}"
            raise HeadraceError(message, hint=f"call it `{PATH_NAMES[0]}` or `{PATH_NAMES[1]}`")
        caption_col = find_column([file], None, CAPTION_NAMES, "", "captions")
        folder = file.path.resolve().parent
        base = folder.relative_to(source.root) if folder.is_relative_to(source.root) else Path()
        for batch in file.batches():
            batches.append(batch.rows)
            types.append(batch.types)
            names = batch.rows.column(path_col).to_pylist()
            paths += [None if name is None else _normal(base, str(name)) for name in names]
            column = batch.rows.column(caption_col).to_pylist() if caption_col else [None] * len(names)
            said += [first_caption(value)[0] for value in column]
    table = unified(batches, types)
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(path or "", []).append(row)
    return table, rows, said


def _normal(base: Path, name: str) -> str:
    """`./b//c.jpg` in the folder `a` as `a/b/c.jpg`."""
    return os.path.normpath(PurePosixPath(as_name(base)) / name.replace("\\", "/"))


# --- an img2dataset output ---------------------------------------------------------------------------


def img2dataset_table(tar: Path) -> Path | None:
    """The table beside a tar that img2dataset wrote (it has `key` and `status`), or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tar.with_suffix(".parquet")
    if not path.is_file():
        return None
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError):
        message = f"{path} is damaged, so {tar.name} was never finished"
        raise HeadraceError(message, hint="move both out of the source, or download that shard again") from None
    return path if {"key", "status"} <= set(names) else None


def _img2dataset(root: Path, tar: Path) -> Iterator[Chunk]:
    """Every row of a shard's table, with its picture or the reason it had for having none."""
    path = img2dataset_table(tar)
    assert path is not None
    batches = list(open_rows(path).batches())
    table = unified([batch.rows for batch in batches], [batch.types for batch in batches])
    found = {entry.path.rpartition("/")[2].partition(".")[0]: entry for entry in tar_entries(root, tar)}
    if table is None:
        yield from _chunked(None, iter(found.values()))
        return
    columns = [_texts(table, name) for name in ("key", "status", "error_message", "caption")]
    entries = []
    for row, (key, status, message, caption) in enumerate(zip(*columns, strict=True)):
        entry = found.pop(key or "", None) or Entry(f"{as_name(tar.relative_to(root))}/{key}.jpg", "")
        if status != "success" or not entry.file:
            entry.error = _reason(status or "", message or "")
        entry.row, entry.caption, entry.extra = row, caption if caption is not None else entry.caption, {}
        entries.append(entry)
    yield from _chunked(table, itertools.chain(entries, found.values()))


def _texts(table: pa.Table, name: str) -> list[str | None]:
    return table[name].to_pylist() if name in table.column_names else [None] * len(table)


def _reason(status: str, message: str) -> str:
    """img2dataset's message as "code: detail"; one that is so already stays."""
    if status == "success":
        return "missing_file: its tar does not hold it"
    if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*(: .*)?", message, re.DOTALL):
        return message
    if http := re.match(r"HTTP Error (\d{3})", message):
        return f"http_{http[1]}: {message}"
    return f"{'corrupt' if status == 'failed_to_resize' else 'source'}: {message}"
