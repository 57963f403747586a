"""Columns and their types: text that is valid, the narrowest type of text, one type for batches that differ.

Pure functions of Arrow arrays; it does not know files or what a column means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def plain(column: pa.Array) -> pa.Array:
    """Dictionaries and views as ordinary arrays, text as valid UTF-8."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kinds.is_string_view(column.type):
        column = column.cast(pa.string())
    if kinds.is_binary_view(column.type):
        column = column.cast(pa.binary())
    return valid_text(column) if kinds.is_string(column.type) or kinds.is_large_string(column.type) else column


def valid_text(column: pa.Array) -> pa.Array:
    """A text column whose invalid bytes, if any, became U+FFFD (Parquet readers do not check)."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        raw = column.cast(pa.large_binary()).to_pylist()
        return pa.array([None if v is None else v.decode("utf-8", "replace") for v in raw], column.type)
    return column


def narrowest(column: pa.Array) -> pa.DataType:
    """int64 or double where every value of a text column is one and turns back into itself, else string."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.drop_null()
    if not len(values):
        return pa.null()
    number = r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d{1,3})?|nan|NaN"
    for kind, pattern in ((pa.int64(), r"0|-?[1-9]\d{0,18}"), (pa.float64(), number)):
        if (
            re.fullmatch(pattern, values[0].as_py())
            and pc.all(pc.match_substring_regex(values, f"^({pattern})$")).as_py()
        ):
            try:
                values.cast(kind)
            except pa.ArrowInvalid:  # beyond 64 bits
                return pa.string()
            return kind
    return pa.string()


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The narrowest type that holds both, text where there is none."""
    import pyarrow as pa

    if a.equals(b):
        return a
    try:
        pair = [pa.schema([("x", kind)]) for kind in (a, b)]
        return pa.unify_schemas(pair, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return pa.string()


def as_type(column: pa.Array, final: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if column.type.equals(final):
        return column
    try:
        return column.cast(final)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if not pa.types.is_string(final):
            raise
        return pa.array([json_text(value) for value in column.to_pylist()], final)


def column_of(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return _storable(pa.array(values))
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        cleaned = [clean(value) for value in values]
    try:
        return _storable(pa.array(cleaned))
    except (pa.ArrowException, OverflowError):
        return pa.array([json_text(value) for value in cleaned], pa.string())


def _storable(column: pa.Array) -> pa.Array:
    """The same array; one that holds objects without a single field, which Parquet cannot, is an ArrowInvalid."""
    import pyarrow as pa

    waiting = [column.type]
    while waiting:
        kind = waiting.pop()
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        if pa.types.is_struct(kind) and not inner:
            raise pa.ArrowInvalid("an object without fields")
        waiting += inner
    return column


def json_text(value: Any) -> str | None:
    """A value as text: a string as it is, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def clean(value: Any) -> Any:
    """JSON with lone surrogates, which no UTF-8 can hold, as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def unified(tables: Iterable[pa.RecordBatch], types: Iterable[pa.Schema]) -> pa.Table | None:
    """Batches of differing columns as one table with all of them, nulls where a batch has none; None for no batch."""
    import pyarrow as pa

    final: dict[str, pa.DataType] = {}
    batches = []
    for batch, schema in zip(tables, types, strict=True):
        batches.append(batch)
        for field in schema:
            final[field.name] = common_type(final.get(field.name, pa.null()), field.type)
    return pa.concat_tables([pa.table(with_columns(batch, final)) for batch in batches]) if batches else None


def with_columns(batch: pa.RecordBatch, types: dict[str, pa.DataType]) -> dict[str, pa.Array]:
    """A batch's columns as these names and types; an absent one is null, one of no type at all is text."""
    import pyarrow as pa

    columns = {}
    for name, kind in types.items():
        final = pa.string() if pa.types.is_null(kind) else kind
        found = batch.column(name) if name in batch.schema.names else pa.nulls(len(batch), final)
        columns[name] = as_type(found, final)
    return columns
