"""A list of URLs, as people publish them, into `urls/`: every row with all its columns, a uid and, where it will not be
fetched, its fate.

It knows the usual names of columns and when two rows are the same; the forms of files are `rowfiles`' business, the
order by uid is `spool`'s, and what a fetchable URL is says `fetch`.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError, digest, file_sha256
from pipeline.intake.coltypes import valid_text
from pipeline.intake.rowfiles import Batch, RowFile, form_of, open_rows
from pipeline.intake.spool import OURS, Rows, UrlShard, uid_bytes, write_shards
from pipeline.shards import DataDir, source_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

URL_NAMES = ("url", "urls", "image_url", "img_url", "imageurl", "image_link", "link", "image_src", "src", "uri", "href")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "alt_text", "alt", "title", "description", "prompt")
COMPRESSION = 5  # about how much longer a row is in memory than in a compressed file


@dataclass(frozen=True)
class UrlList:
    """The files of a list, in order, and which columns hold URL and caption (None: the list has no captions)."""

    files: tuple[RowFile, ...]
    url_col: str
    caption_col: str | None

    def fingerprint(self) -> str:
        """A digest of the files' contents, whatever their names: other contents, another list."""
        return digest([file_sha256(file.path) for file in self.files])


def open_list(pattern: str | Path, url_col: str | None = None, caption_col: str | None = None) -> UrlList:
    """Find a list's files (a path, a glob or a folder) and its columns, by their usual names where none is given.

    A file that is missing has exit code 3; one that cannot be read, or a column that is not there, 2.
    """
    files = tuple(open_rows(path) for path in find_files(pattern))
    used = [file for file in files if file.columns]
    if not used:
        raise HeadraceError(f"{pattern} is empty: it has no rows", hint="name a list with at least one URL")
    url = find_column(used, url_col, URL_NAMES, "--url-col", "URLs")
    caption = find_column(used, caption_col, CAPTION_NAMES, "--caption-col", "captions")
    if url is None:
        raise _no_column(used[0], "none of its columns has a usual name of URLs", "--url-col")
    for file in used:
        if url not in file.columns:
            raise _no_column(file, f"it has no column `{url}` for the URLs, which {used[0].path.name} has", "--url-col")
        named = find_column([file], None, CAPTION_NAMES, "--caption-col", "captions")
        if caption_col is None and named and caption not in file.columns:
            why = f"its captions seem to be in `{named}`, those of {used[0].path.name} in `{caption}`"
            raise HeadraceError(
                f"{file.path}: {why}", hint="give both columns one name, or name one with --caption-col"
            )
    return UrlList(tuple(used), url, caption)


def find_files(pattern: str | Path) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted; none at all is a `HeadraceError` of exit code 3."""
    path = Path(pattern)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and form_of(p) and p.name[0] not in "._")
        why = f"the folder {path} holds no .parquet, .csv, .tsv, .json, .jsonl or .txt file"
    elif path.exists() or not glob.has_magic(str(pattern)):
        found, why = [path] if path.exists() else [], f"there is no file {path}"
    else:
        names = glob.glob(str(pattern), recursive=True)  # Path.glob takes no absolute pattern
        found = sorted(path for path in map(Path, names) if path.is_file())
        why = f"no file matches {pattern}"
    if not found:
        raise HeadraceError(why, hint="check the path (quote a glob, so that the shell leaves it alone)", code=MISSING)
    return found


def find_column(
    files: Sequence[RowFile], asked: str | None, usual: Sequence[str], option: str, what: str
) -> str | None:
    """The column asked for, or the first one of a usual name in any case; None where none was asked for or found."""
    first = files[0]
    if asked is None:
        lowered = {name.lower(): name for name in reversed(first.columns)}
        return next((lowered[name] for name in usual if name in lowered), None)
    if any(asked in file.columns for file in files):
        return asked
    raise _no_column(first, f"it has no column `{asked}` for the {what}", option, asked)


def _no_column(file: RowFile, why: str, option: str, asked: str | None = None) -> HeadraceError:
    columns = ", ".join(f"`{name}`" for name in file.columns)
    lowered = {name.lower(): name for name in file.columns}
    near = difflib.get_close_matches(asked.lower(), lowered, n=1, cutoff=0.6) if asked else []
    hint = f"did you mean {option} {lowered[near[0]]}?" if near else f"name one with {option}"
    return HeadraceError(f"{file.path}: {why}; its columns are {columns}", hint=hint)


def write_urls(source: UrlList, data: DataDir, shard_size: int) -> list[UrlShard]:
    """Write every row of the list to `urls/`, ordered by uid, `shard_size` rows to a shard; equal lists, equal bytes.

    Fates: `urls:malformed_row`, `urls:no_url`, `urls:invalid_url`, `urls:scheme`, `urls:repeated`, or null: to be
    fetched. A list without a single row is a `HeadraceError`.
    """
    sizes = (file.path.stat().st_size * (1 if _plain_text(file.path) else COMPRESSION) for file in source.files)
    written = write_shards(_list_rows(source), data, shard_size, sum(sizes))
    if not written:
        raise HeadraceError(
            f"{source.files[0].path} is empty: it has no rows", hint="name a list with at least one URL"
        )
    return written


def _plain_text(path: Path) -> bool:
    return path.suffix.lower() not in (".parquet", ".gz", ".zst")


def _list_rows(source: UrlList) -> Iterator[Rows]:
    names: dict[str, str] = {}
    for file in source.files:
        for batch in file.batches():
            yield _prepared(source, file, batch, names)


def _prepared(source: UrlList, file: RowFile, batch: Batch, names: dict[str, str]) -> Rows:
    """uid, url, caption, fate and the remaining columns of a batch; `names` gathers how columns are renamed."""
    import pyarrow as pa

    rows = batch.rows
    nulls = pa.nulls(len(rows), pa.string())
    found = {name: rows.column(name) for name in rows.schema.names}
    url = as_text(found[source.url_col], source.url_col, file.path) if source.url_col in found else nulls
    caption = nulls
    if source.caption_col in found:
        caption = without_nul(as_text(found[source.caption_col], source.caption_col, file.path))
    fate = _fates(url, batch.malformed)
    uid, kept = uids(url, caption, found)
    absorbed = {source.url_col, source.caption_col} | ({kept} if kept else set())
    columns, types = own_columns(batch, names, absorbed)
    return Rows(uid, url, caption, fate, columns, types)


def own_columns(batch: Batch, names: dict[str, str], absorbed: set[str | None]) -> tuple[pa.RecordBatch, pa.Schema]:
    """The input's columns under the names that `urls/` gives them, and their types.

    A name that differs from another only in its case gives way too, since SQL does not tell the two apart. A column
    that stands under our name already (`absorbed`, and called so in any case) is not written twice.
    """
    import pyarrow as pa

    arrays, fields = [], []
    for i, name in enumerate(batch.rows.schema.names):
        if name in absorbed and name.lower() in OURS:
            continue
        if name not in names:
            taken = {*OURS, *(other.lower() for other in names.values())}
            final = name
            while final.lower() in taken:
                final = source_name(final, {final})
            names[name] = final
        arrays.append(batch.rows.column(i))
        fields.append(pa.field(names[name], batch.types.field(i).type))
    if not arrays:
        return pa.RecordBatch.from_pylist([{}] * len(batch.rows), pa.schema([])), pa.schema([])
    return pa.RecordBatch.from_arrays(arrays, names=[field.name for field in fields]), pa.schema(fields)


def as_text(column: pa.Array, name: str | None, path: Path) -> pa.Array:
    """A column as valid text; one of lists or structs is a `HeadraceError`."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_nested(column.type):
        message = f"{path}: column `{name}` is {column.type}, not text"
        raise HeadraceError(message, hint="name a column of text with --url-col or --caption-col")
    if kinds.is_binary(column.type) or kinds.is_large_binary(column.type):
        raw = column.to_pylist()
        return pa.array([None if value is None else value.decode("utf-8", "replace") for value in raw], pa.string())
    return valid_text(column).cast(pa.string())


def without_nul(column: pa.Array) -> pa.Array:
    """A text column with U+FFFD for each NUL, which text tools would end at."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.any(pc.match_substring(column, "\0")).as_py():
        return column
    return pa.array([None if v is None else v.replace("\0", "\ufffd") for v in column.to_pylist()], pa.string())


def uids(
    url: pa.Array, caption: pa.Array, columns: dict[str, pa.Array]
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str | None]:
    """Uids of shape (rows, 16) uint8: the input's own where its column `uid` has 32 hex digits, else computed.

    Also the name of that column where every row's uid was taken from it, so that it need not be kept apart.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    computed = uid_bytes(url, caption)
    name = next((name for name in columns if name.lower() == "uid"), None)
    if name is None or not (pa.types.is_string(columns[name].type) or pa.types.is_large_string(columns[name].type)):
        return computed, None
    own = columns[name]
    valid = np.asarray(pc.fill_null(pc.match_substring_regex(own, "^[0-9a-f]{32}$"), False))
    if valid.any():
        text = "".join(own.filter(pa.array(valid)).to_pylist())
        computed = computed.copy()
        computed[valid] = np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 16)
    return computed, name if valid.all() else None


_BROKEN = re.compile("[\0\ufffd]")  # what was no text when it came in cannot be the URL that was meant
# Most URLs are this plain, and `normalise_url` accepts all that are: it is asked only about the others.
PLAIN_URL = r"^https?://([a-z0-9]{1,20}(-[a-z0-9]{1,20}){0,2}\.){1,3}[a-z]{2,12}(/[!-~]{0,900})?$"


def _fates(url: pa.Array, malformed: pa.BooleanArray) -> pa.Array:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = pc.and_not(pc.fill_null(pc.match_substring_regex(url, PLAIN_URL), False), malformed)
    asked = np.flatnonzero(~np.asarray(plain))
    fates = np.full(len(url), None, dtype=object)
    pairs = zip(url.take(pa.array(asked)).to_pylist(), malformed.take(pa.array(asked)).to_pylist(), strict=True)
    fates[asked] = [_fate(text, bad) for text, bad in pairs]
    return pa.array(fates, pa.string())


def _fate(url: str | None, malformed: bool) -> str | None:
    from pipeline.fetch.client import normalise_url

    if malformed:
        return "urls:malformed_row"
    if url is None or not url.strip():
        return "urls:no_url"
    error = "invalid_url" if _BROKEN.search(url) else normalise_url(url)[1]
    return error and f"urls:{error}"
