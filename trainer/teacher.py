"""What another network says of the pictures: vectors in a column of the sets, read off a CLIP's picture vectors.

A network that has seen more pictures knows likenesses that a small set cannot teach; a linear head that must find its
vectors in those of the image tower hands them on (Romero et al. 2015, "FitNets: hints for thin deep nets"). It knows
nothing of how the vectors were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base import MISSING, REFUSED, HeadraceError
from pipeline.shards import parquet_file, read_parquet, shard_files, vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST = 1e-3  # of a dimension's deviation, as a share of the largest: one that hardly varies is not blown up


class Lesson(NamedTuple):
    """Levelled vectors float32 (K, D) of those of N pictures that have one, and which those are, bool (N,)."""

    vectors: Tensor
    there: Tensor


class Lessons:
    """The vectors of all sets' training rows, every dimension brought to mean 0 and deviation 1 over all of them.

    `columns` has an array (rows, D) for each set; rows of zeros teach nothing, and the others are not all the same.
    """

    def __init__(self, columns: Sequence[NDArray[np.float16]]) -> None:
        self._columns = columns
        self.dimension = columns[0].shape[1]
        known = np.concatenate([rows[_there(rows)] for rows in columns]).astype(np.float32)
        deviation = known.std(axis=0)
        self._mean = torch.from_numpy(known.mean(axis=0))
        self._deviation = torch.from_numpy(np.maximum(deviation, SMALLEST * deviation.max()))

    def take(self, rows: Sequence[NDArray[np.int64]]) -> Lesson:
        """What the teacher says of these rows of each set."""
        taken = np.concatenate([column[chosen] for column, chosen in zip(self._columns, rows, strict=True)])
        there = _there(taken)
        levelled = (torch.from_numpy(taken[there]).float() - self._mean) / self._deviation
        return Lesson(levelled, torch.from_numpy(there))


def read_lessons(folders: Sequence[Path], column: str) -> Lessons:
    """The lessons in `column` of the sets' training tables; sets and rows without it teach nothing.

    Raises:
        HeadraceError: no set has the column, it holds no vectors, they differ in length or are not finite.
    """
    shards = [[_read_shard(path, column) for path in shard_files(folder / "train", "parquet")] for folder in folders]
    widths = sorted({part.shape[1] for parts in shards for part in parts} - {0})
    if not widths:
        hint = "curate a list that has such a column, or leave `training.teacher` out"
        raise HeadraceError(f"no set has vectors in a column {column}", hint=hint, code=MISSING)
    if len(widths) > 1:
        told = " and ".join(map(str, widths))
        hint = "take the vectors of one network"
        raise HeadraceError(f"the sets' vectors in {column} differ in length: {told}", hint=hint, code=REFUSED)
    columns = [np.concatenate([_of_width(part, widths[0]) for part in parts]) for parts in shards]
    known = np.concatenate([rows[_there(rows)] for rows in columns])
    if not np.any(known != known[:1]):
        hint = "take another column, or leave `training.teacher` out"
        raise HeadraceError(f"the vectors in {column} say the same of all pictures", hint=hint, code=REFUSED)
    return Lessons(columns)


def _read_shard(path: Path, column: str) -> NDArray[np.float16]:
    """The column (rows, D), rows without a vector zero; of width 0 where no row has one."""
    rows = parquet_file(path).metadata.num_rows
    if column not in parquet_file(path).schema_arrow.names:
        return np.zeros((rows, 0), np.float16)
    given = read_parquet(path, [column])[column]
    try:
        lengths = pc.unique(pc.drop_null(pc.list_value_length(given))).to_pylist()
        one_length = given.cast(pa.list_(pa.float32(), lengths[0])) if lengths else None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        lengths = [0]
    if lengths == [0]:
        hint = "give lists of numbers of one length, or leave `training.teacher` out"
        raise HeadraceError(f"{path} has no vectors in its column {column}", hint=hint, code=REFUSED)
    with np.errstate(over="ignore"):
        out = np.asarray(np.zeros((rows, 0)) if one_length is None else vectors(one_length), np.float16)
    if not np.isfinite(out).all():
        hint = "make them again, or drop those rows"
        raise HeadraceError(f"{path} has a vector in {column} that is not finite in float16", hint=hint, code=REFUSED)
    return out


def _of_width(rows: NDArray[np.float16], width: int) -> NDArray[np.float16]:
    return rows if rows.shape[1] else np.zeros((len(rows), width), np.float16)


def _there(rows: NDArray[np.float16]) -> NDArray[np.bool_]:
    return np.asarray(rows.any(axis=1), np.bool_)


class TeacherHead(nn.Module):
    """A teacher's levelled vectors from unit picture vectors."""

    def __init__(self, dimension: int, taught: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, taught)

    def forward(self, images: Tensor) -> Tensor:
        """Unit vectors (N, dimension) -> (N, taught)."""
        told: Tensor = self.linear(images * images.shape[1] ** 0.5)
        return told


def teacher_loss(head: TeacherHead, images: Tensor, levelled: Tensor) -> Tensor:
    """Mean squared error of what is read off unit images (K, dimension), against levelled (K, D): 1 says nothing."""
    return F.mse_loss(head(images), levelled) if len(images) else levelled.sum()
