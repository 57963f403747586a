"""Packed sets as arrays and pictures: what lies where, in which order, and decoding it.

A packed set is indexed once from its Parquet files; pictures are then read by offset and length. The order is a pure
function of (seed, epoch), so a position is two numbers and resume is exact. This module knows nothing of models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import simplejpeg
import torch

from pipeline.base import MISSING, REFUSED, HeadraceError, read_json
from pipeline.shards import FORMAT_VERSION, parquet_file, read_parquet, shard_files
from trainer.workers import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Preprocess

KEEP_DECODED = 4 << 30  # bytes of small pictures held in memory; a larger set is decoded as it is read
FEW = 8  # fewer pictures than so many are decoded in threads, for which no processes are begun


@dataclass(frozen=True)
class PackedSet:
    """One split of a packed set, row by row: shard number, place in the tar, caption, swapped captions, and what
    another network takes the picture for."""

    tars: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    captions: tuple[str, ...]
    swaps: tuple[tuple[str, ...], ...]
    guesses: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def tells_swaps(self) -> bool:
        """Whether the set names swapped captions itself; then a row without them has none that may be trained on."""
        return any(self.swaps)

    def read(self, row: int) -> bytes:
        """The bytes of one picture; a tar that is missing or cut short is a `HeadraceError`."""
        path, length = self.tars[self.shard[row]], int(self.length[row])
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), length, int(self.offset[row]))
        except OSError as error:
            raise _damaged(path, (error.strerror or str(error)).lower()) from None
        if len(data) < length:
            raise _damaged(path, f"the picture of row {row} is cut short")
        return data


def open_set(folder: Path, split: str) -> PackedSet:
    """Index `folder/split` of a packed set.

    Raises:
        HeadraceError: no packed set there, an unknown format, no such split, no row, or no row with a caption.
    """
    if not (folder / "dataset.json").is_file():
        hint = "give --shards the folder that `curate pack` wrote, for example data/curated"
        raise HeadraceError(f"{folder} is no packed set: it has no dataset.json", hint=hint, code=MISSING)
    version = read_json(folder / "dataset.json").get("format_version")
    if version != FORMAT_VERSION:
        hint = "pack it again with this version"
        raise HeadraceError(f"{folder} has format {version}, not {FORMAT_VERSION}", hint=hint, code=REFUSED)
    tables = [read_parquet(path, _columns(path)) for path in shard_files(folder / split, "parquet")]
    if any("caption" not in table.column_names for table in tables):
        raise HeadraceError(f"{folder}/{split} has no column `caption`", hint="pack a set with captions")
    rows = sum(len(table) for table in tables)
    if rows == 0:
        hint = (
            "pack at least 10 pictures, with --val-fraction above 0" if split == "val" else "pack a set that keeps some"
        )
        raise HeadraceError(f"{folder} has no samples in {split}", hint=hint, code=MISSING)
    captions = tuple(text or "" for table in tables for text in table["caption"].to_pylist())
    if not any(text.strip() for text in captions):
        raise HeadraceError(f"no sample in {folder}/{split} has a caption", hint="pack a set with captions")
    return PackedSet(
        tars=tuple(path.with_suffix(".tar") for path in shard_files(folder / split, "parquet")),
        shard=np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables]),
        offset=np.concatenate([table["offset"].to_numpy() for table in tables]),
        length=np.concatenate([table["length"].to_numpy() for table in tables]),
        captions=captions,
        swaps=_lists(tables, "swaps"),
        guesses=_lists(tables, "guesses"),
    )


def _lists(tables: Sequence[pa.Table], column: str) -> tuple[tuple[str, ...], ...]:
    """A column of lists of texts, empty where there is none."""
    parts = [_texts(table, column) for table in tables]
    return tuple(tuple(text for text in row or () if text) for part in parts for row in part)


def _texts(table: pa.Table, column: str) -> Sequence[Sequence[str | None] | None]:
    """A user's column of that name may be of any type: what is no list of texts says nothing."""
    kind = table.schema.field(column).type if column in table.column_names else None
    if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return [()] * len(table)
    texts = pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    return list(table[column].to_pylist()) if texts else [()] * len(table)


def _columns(path: Path) -> list[str]:
    """Those that a set is indexed by; vectors and signals stay on the disk."""
    there = parquet_file(path).schema_arrow.names
    return [name for name in ("caption", "swaps", "guesses", "offset", "length") if name in there]


def check_tars(packed: PackedSet) -> None:
    """Raise where a tar is missing, or shorter than its table says: before anything is learned."""
    ends = np.zeros(len(packed.tars), dtype=np.int64)
    np.maximum.at(ends, packed.shard, packed.offset + packed.length)
    for path, end in zip(packed.tars, ends, strict=True):
        if not path.is_file():
            raise _damaged(path, "no such file")
        if path.stat().st_size < end:
            raise _damaged(path, "it is cut short")


class Pictures:
    """The pictures of a set at one small size, decoded once where memory allows, else when asked for.

    Without `keep` few are asked for, and none is held.
    """

    def __init__(self, packed: PackedSet, shape: Preprocess, keep: bool = True) -> None:
        check_tars(packed)
        self._packed = packed
        self._shape = shape
        self._size = 3, shape.height, shape.width
        self._kept: torch.Tensor | None = None
        self._workers: Workers | None = None
        self._streams = keep and len(packed) * math.prod(self._size) > KEEP_DECODED
        if keep and not self._streams:
            self._kept = self._decode(np.arange(len(packed)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self._shape.height, self._shape.width

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """uint8 pictures (N, 3, height, width) of these rows."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(rows)]
        if not self._streams or len(rows) < FEW:
            return self._decode(rows)
        if self._workers is None or self._workers.room < len(rows):
            make = partial(_picture, self._packed, self._shape)  # not of this object: a circle would keep both
            self._workers = Workers(make, self._size, len(rows))
        return self._workers.take(rows)

    def _decode(self, rows: NDArray[np.int64]) -> torch.Tensor:
        out = torch.empty((len(rows), *self._size), dtype=torch.uint8)

        def fill(place: int) -> None:
            out[place] = _picture(self._packed, self._shape, int(rows[place]))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill, range(len(rows))):
                pass
        return out


def _picture(packed: PackedSet, shape: Preprocess, row: int) -> torch.Tensor:
    """uint8 (3, height, width); one that cannot be read is a `HeadraceError`."""
    data = packed.read(row)
    try:
        return shape(decode(data, shape))
    except ValueError as error:
        path = packed.tars[packed.shard[row]]
        raise _damaged(path, f"the picture of row {row} is no JPEG ({error})") from None


def decode(data: bytes, shape: Preprocess) -> NDArray[np.uint8]:
    """A JPEG as RGB (H, W, 3), at no less than the size that `shape` needs (the decoder halves as it reads)."""
    picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, min_height=shape.height, min_width=shape.width, min_factor=1.5
    )
    return picture


def epoch_order(captions: tuple[str, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """Row numbers of one epoch: each distinct caption once, by one of its pictures drawn at random, shuffled.

    So no batch holds a caption twice, which would count a right answer as wrong, and a caption that thousands of
    pictures share weighs as one. Rows without a caption are left out. A pure function of its arguments.
    """
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(captions))
    first: dict[str, int] = {}
    for row in shuffled.tolist():
        text = captions[row].strip()
        if text:
            first.setdefault(text, row)
    return np.fromiter(first.values(), dtype=np.int64, count=len(first))


class Batches:
    """Which rows a step takes: epochs follow one another, and each drops its last odd rows.

    A set with fewer distinct captions than `size` gives all of them at every step.
    """

    def __init__(self, captions: tuple[str, ...], seed: int, size: int) -> None:
        self._captions, self._seed = captions, seed
        self.distinct = len({text.strip() for text in captions if text.strip()})
        self.size = min(size, self.distinct)
        self._epoch = -1
        self._order = epoch_order((), seed, 0)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers of the batch of one step, counted from 0: a pure function of it."""
        epoch, place = divmod(step, self.distinct // self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._captions, self._seed, epoch)
        return self._order[place * self.size : (place + 1) * self.size]


def _damaged(path: Path, why: str) -> HeadraceError:
    return HeadraceError(f"{path} cannot be read: {why}", hint="check it with `curate verify`", code=MISSING)
