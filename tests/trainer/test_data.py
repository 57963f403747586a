"""Packed sets: what is read, in which order, and what is said of a set that cannot be read."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.base import HeadraceError
from pipeline.clip import Preprocess
from tests.trainer.packed import pictures_and_captions, write_packed
from tests.trainer.test_workers import ended
from trainer import data
from trainer.data import Batches, Pictures, epoch_order, open_set

SMALL = Preprocess(24, 24, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3, 0)


def test_rows_come_in_tar_order_over_shards(tmp_path: Path) -> None:
    packed = open_set(write_packed(tmp_path), "train")
    pictures, captions = pictures_and_captions()
    assert list(packed.captions) == captions and len(packed.tars) == 2
    assert [packed.read(row) for row in range(16)] == pictures


def test_swaps_are_read_where_the_set_has_them(tmp_path: Path) -> None:
    assert open_set(write_packed(tmp_path / "a"), "train").swaps == ((),) * 16
    swaps = [["wrong", "other"]] + [[]] * 15
    assert open_set(write_packed(tmp_path / "b", swaps=swaps), "train").swaps[0] == ("wrong", "other")


@pytest.mark.parametrize(
    ("column", "read"),
    [
        (pa.array([["owl", "cat"], None, ["owl", None]]), (("owl", "cat"), (), ("owl",))),
        (pa.array([["owl"], [], None], pa.large_list(pa.large_string())), (("owl",), (), ())),
        (pa.array(["owl", "cat", None]), ((), (), ())),
        (pa.array([3, 0, None]), ((), (), ())),
        (pa.array([[3, 4], [0], None]), ((), (), ())),
    ],
)
def test_guesses_are_lists_of_texts_and_a_column_of_another_type_says_nothing(
    tmp_path: Path, column: pa.Array, read: tuple[tuple[str, ...], ...]
) -> None:
    folder = write_packed(tmp_path, rows=3)
    path = folder / "train" / "00000.parquet"
    pq.write_table(pq.read_table(path).append_column("guesses", column), path)
    assert open_set(folder, "train").guesses == read
    assert open_set(folder, "val").guesses == ((),) * 3


def test_kept_and_streamed_pictures_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = open_set(write_packed(tmp_path), "train")
    rows = np.array([3, 15, 0, 3, 1, 2, 4, 5, 6])
    kept = Pictures(packed, SMALL).take(rows)
    monkeypatch.setattr(data, "KEEP_DECODED", 0)
    pictures = Pictures(packed, SMALL)
    streamed = pictures.take(rows)
    assert torch.equal(pictures.take(rows[:4]), kept[:4])
    assert kept.shape == (9, 3, 24, 24) and kept.dtype == torch.uint8
    assert torch.equal(kept, streamed) and torch.equal(kept[0], kept[3])
    left = kept[1, :, :, :8].float().mean(dim=(1, 2))  # row 15 is white and white
    assert (left > 235).all()


def test_a_picture_that_is_no_jpeg_in_a_whole_tar_is_named(tmp_path: Path) -> None:
    packed = open_set(write_packed(tmp_path), "train")
    with packed.tars[0].open("r+b") as file:
        file.seek(packed.offset[9])
        file.write(bytes(int(packed.length[9])))
    with pytest.raises(HeadraceError, match="row 9 is no JPEG") as caught:
        Pictures(packed, SMALL)
    assert caught.value.code == 3 and str(packed.tars[0]) in caught.value.message


def test_the_processes_of_a_streamed_set_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "KEEP_DECODED", 0)
    before = set(multiprocessing.active_children())
    pictures = Pictures(open_set(write_packed(tmp_path), "train"), SMALL)
    pictures.take(np.arange(16))
    begun = [child.pid for child in set(multiprocessing.active_children()) - before]
    gc.disable()  # what holds itself would stay
    try:
        del pictures
        assert begun and all(ended(pid) for pid in begun if pid)
    finally:
        gc.enable()


def test_an_epoch_has_every_caption_once_and_spreads_over_its_pictures() -> None:
    captions = ("a", "b", " a ", "", "c", "a")
    orders = [epoch_order(captions, 0, epoch) for epoch in range(60)]
    assert all(sorted(captions[row].strip() for row in order) == ["a", "b", "c"] for order in orders)
    assert {row for order in orders for row in order.tolist()} == {0, 1, 2, 4, 5}
    assert any(not np.array_equal(orders[0], order) for order in orders[1:])
    assert np.array_equal(orders[7], epoch_order(captions, 0, 7))
    assert any(not np.array_equal(epoch_order(captions, 1, epoch), orders[epoch]) for epoch in range(9))


def test_batches_are_a_function_of_the_step_alone() -> None:
    captions = tuple(str(n) for n in range(23))
    straight = Batches(captions, seed=5, size=4)
    rows = [straight.rows(step).tolist() for step in range(20)]
    assert [Batches(captions, 5, 4).rows(step).tolist() for step in range(20)] == rows
    first_epoch = [row for batch in rows[:5] for row in batch]
    assert len(first_epoch) == len(set(first_epoch)) == 20
    assert straight.rows(2).tolist() == rows[2]


def test_a_small_set_gives_all_it_has() -> None:
    batches = Batches(("a", "b", "a"), seed=0, size=100)
    assert batches.size == 2 and sorted(len(batches.rows(step)) for step in range(3)) == [2, 2, 2]


def test_what_is_said_of_a_set_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="is no packed set") as caught:
        open_set(tmp_path / "nowhere", "train")
    assert caught.value.code == 3
    packed = write_packed(tmp_path / "set")
    with pytest.raises(HeadraceError, match="no samples in test"):
        open_set(packed, "test")
    (packed / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(HeadraceError, match="format 99"):
        open_set(packed, "train")
    with pytest.raises(HeadraceError, match="has a caption"):
        open_set(write_packed(tmp_path / "mute", captions=[None, "", " "] + [None] * 13), "train")


def test_a_tar_that_is_missing_or_cut_short(tmp_path: Path) -> None:
    packed = open_set(write_packed(tmp_path), "train")
    whole = packed.tars[0].read_bytes()
    packed.tars[0].write_bytes(whole[: packed.offset[9] + 10])
    assert packed.read(0)
    with pytest.raises(HeadraceError, match="cut short"):
        packed.read(9)
    packed.tars[0].unlink()
    with pytest.raises(HeadraceError, match="no such file"):
        packed.read(0)
