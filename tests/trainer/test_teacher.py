"""A teacher's column: read from sets, levelled, learned from, and what is no such column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.base import MISSING, REFUSED, HeadraceError
from pipeline.shards import read_parquet, shard_files, write_parquet
from tests.trainer.packed import with_column, write_packed
from trainer.teacher import Lessons, TeacherHead, read_lessons, teacher_loss

WIDTH = 5


def taught(folder: Path, values: np.ndarray, there: np.ndarray | None = None) -> Path:
    """A small set whose training rows carry these vectors (16, D)."""
    return with_column(write_packed(folder), "teacher", values, there)


def random_rows(seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (16, width)).astype(np.float16)


def test_every_dimension_is_levelled_over_all_sets(tmp_path: Path) -> None:
    folders = [taught(tmp_path / "a", random_rows(1)), taught(tmp_path / "b", random_rows(2) * 4)]
    lessons = read_lessons(folders, "teacher")
    levelled, there = lessons.take([np.arange(16), np.arange(16)])
    assert lessons.dimension == WIDTH and there.all()
    torch.testing.assert_close(levelled.mean(dim=0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    torch.testing.assert_close(levelled.std(dim=0, correction=0), torch.ones(WIDTH), atol=1e-4, rtol=0)


def test_rows_keep_their_own_vectors_across_shards(tmp_path: Path) -> None:
    values = random_rows()
    lessons = read_lessons([taught(tmp_path / "set", values)], "teacher")
    order = np.random.default_rng(1).permutation(16)
    levelled, _ = lessons.take([order])
    exact = values.astype(np.float32)
    expected = (exact[order] - exact.mean(axis=0)) / exact.std(axis=0)
    torch.testing.assert_close(levelled, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_sets_and_rows_without_a_vector_teach_nothing(tmp_path: Path) -> None:
    there = np.arange(16) % 2 == 0
    folders = [write_packed(tmp_path / "plain"), taught(tmp_path / "half", random_rows(), there)]
    lessons = read_lessons(folders, "teacher")
    levelled, known = lessons.take([np.arange(4), np.arange(4)])
    assert known.tolist() == [False] * 4 + [True, False, True, False]
    torch.manual_seed(0)
    head, images = TeacherHead(3, WIDTH), torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
    loss = teacher_loss(head, images[known], levelled)
    torch.testing.assert_close(loss, (head(images[known]) - levelled).square().mean())
    assert teacher_loss(head, images[:0], levelled[:0]) == 0


def test_a_dimension_that_hardly_varies_is_not_blown_up() -> None:
    values = random_rows()
    values[:, 0] = 0.5
    levelled, _ = Lessons([values]).take([np.arange(16)])
    assert levelled[:, 0].abs().max() < 0.1 and torch.isfinite(levelled).all()


@pytest.mark.parametrize(
    ("column", "code", "said"),
    [("nothing", MISSING, "no set has vectors"), ("caption", REFUSED, "no vectors"), ("length", REFUSED, "no vectors")],
)
def test_a_column_without_vectors_is_named(tmp_path: Path, column: str, code: int, said: str) -> None:
    folder = taught(tmp_path / "set", random_rows())
    with pytest.raises(HeadraceError, match=said) as caught:
        read_lessons([folder], column)
    assert caught.value.code == code and column in str(caught.value)


def test_vectors_that_differ_in_length_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    folders = [taught(tmp_path / "a", random_rows()), taught(tmp_path / "b", random_rows(width=7))]
    with pytest.raises(HeadraceError, match="differ in length: 5 and 7"):
        read_lessons(folders, "teacher")
    values = random_rows()
    values[3, 2] = np.nan
    with pytest.raises(HeadraceError, match="not finite"):
        read_lessons([taught(tmp_path / "c", values)], "teacher")


def test_lists_as_other_tools_write_them_are_vectors_too(tmp_path: Path) -> None:
    folder, values = write_packed(tmp_path / "set"), random_rows().astype(np.float32)
    start = 0
    for path in shard_files(folder / "train", "parquet"):
        table = read_parquet(path)
        rows = values[start : start + len(table)].tolist()
        start += len(table)
        write_parquet(table.append_column("theirs", pa.array(rows, pa.list_(pa.float32()))), path)
    levelled, there = read_lessons([folder], "theirs").take([np.arange(16)])
    assert there.all()
    expected = (values - values.mean(axis=0)) / values.std(axis=0)
    torch.testing.assert_close(levelled, torch.from_numpy(expected), atol=2e-2, rtol=0)


@pytest.mark.parametrize("value", [0, 2])
def test_a_teacher_that_says_the_same_of_all_pictures_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(HeadraceError, match="say the same of all"):
        read_lessons([taught(tmp_path / "set", np.full((16, WIDTH), value))], "teacher")


def test_what_float16_cannot_hold_and_empty_lists_are_refused(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "set")
    for path in shard_files(folder / "train", "parquet"):
        table = read_parquet(path)
        for name, row in (("large", [1e6, 1.0]), ("empty", [])):
            table = table.append_column(name, pa.array([row] * len(table), pa.list_(pa.float64())))
        write_parquet(table, path)
    with pytest.raises(HeadraceError, match="not finite in float16"):
        read_lessons([folder], "large")
    with pytest.raises(HeadraceError, match="no vectors"):
        read_lessons([folder], "empty")
