"""Vectors, weights, token states and draws: what comes out, in which order, and what is said of bad sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.base import HeadraceError
from pipeline.clip import Clip, load
from pipeline.shards import read_parquet, vector_column, write_parquet
from tests.trainer.packed import pictures_and_captions, write_packed
from trainer import embedded
from trainer.embedded import CaptionTokens, Draws, check_identity, read_embeddings, weighted_order


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


def test_equal_weights_give_every_row_once_in_another_order_each_epoch() -> None:
    weights = np.full(1000, 0.7)
    orders = [weighted_order(weights, 0, epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[2], weighted_order(weights, 0, 2))
    assert not np.array_equal(orders[0], weighted_order(weights, 1, 0))


def test_rows_come_as_often_as_their_weight_says() -> None:
    weights = np.array([0.0, 1, 2, 0.5, 0, 4, 1])
    counts = np.zeros(7)
    for epoch in range(4000):
        order = weighted_order(weights, 5, epoch)
        assert len(order) == 5
        counts += np.bincount(order, minlength=7)
    np.testing.assert_allclose(counts / 4000, 5 * weights / weights.sum(), atol=0.03)


def test_draws_are_a_function_of_the_step_and_lose_no_row() -> None:
    straight = Draws(np.ones(10), 3, 4)
    rows = [straight.rows(step).tolist() for step in range(10)]
    assert [Draws(np.ones(10), 3, 4).rows(step).tolist() for step in range(10)] == rows
    flat = [row for batch in rows for row in batch]
    assert all(sorted(flat[start : start + 10]) == list(range(10)) for start in range(0, 40, 10))
    assert Draws(np.ones(3), 0, 8).rows(1).shape == (8,)  # a batch larger than the set


def test_vectors_are_read_in_tar_order(tmp_path: Path, clip: Clip) -> None:
    found = read_embeddings(write_packed(tmp_path, clip=clip), "train")
    _, captions = pictures_and_captions()
    np.testing.assert_allclose(found.text, clip.encode_texts(captions), atol=1e-3)
    assert found.image.shape == (16, clip.dimension) and (found.weight == 1).all()


def changed(folder: Path, **columns: object) -> Path:
    path = folder / "train" / "00000.parquet"
    table = read_parquet(path)
    for name, value in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(value))  # type: ignore[call-overload]
    write_parquet(table, path)
    return folder


def test_the_column_weight_says_how_often_a_row_is_drawn(tmp_path: Path, clip: Clip) -> None:
    folder = changed(write_packed(tmp_path, clip=clip), weight=np.array([3, 1] * 5, np.float32))
    draws = Draws(read_embeddings(folder, "train").weight, 0, 16)
    drawn = np.bincount(np.concatenate([draws.rows(step) for step in range(200)]), minlength=16)
    assert drawn[:10:2].sum() == pytest.approx(3 * drawn[1:10:2].sum(), rel=0.03)
    assert drawn[10:].mean() == pytest.approx(drawn[1:10:2].mean(), rel=0.03)  # the other shard's are 1


def test_a_row_without_a_vector_is_never_drawn(tmp_path: Path, clip: Clip) -> None:
    vectors = clip.encode_texts(pictures_and_captions()[1][:10])
    there = np.arange(10) != 3
    found = read_embeddings(changed(write_packed(tmp_path, clip=clip), text_emb=vector_column(vectors, there)), "train")
    assert found.weight[3] == 0 and 3 not in found.usable() and len(found.usable()) == 15


def test_vectors_that_exceed_the_room_are_mapped_and_equal(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_packed(tmp_path, clip=clip)
    held = read_embeddings(folder, "train")
    monkeypatch.setattr(embedded, "KEEP_VECTORS", 0)
    mapped = read_embeddings(folder, "train")
    assert isinstance(mapped.image, np.memmap) and not isinstance(held.image, np.memmap)
    rows = np.array([12, 0, 12])
    for name in ("image", "text", "weight"):
        assert np.array_equal(getattr(held, name)[rows], getattr(mapped, name)[rows]), name
    assert mapped.image.dtype == np.float16 and np.allclose(np.linalg.norm(held.image[15].astype(float)), 1, atol=1e-3)


def test_what_is_said_of_bad_numbers(tmp_path: Path, clip: Clip) -> None:
    vectors = clip.encode_texts(pictures_and_captions()[1][:10])
    vectors[4, 7] = np.nan
    bad = changed(write_packed(tmp_path / "nan", clip=clip), image_emb=vector_column(vectors, np.ones(10, bool)))
    with pytest.raises(HeadraceError, match="impossible vector in sample 000000004"):
        read_embeddings(bad, "train")
    vectors[4, 7], vectors[6, 0] = 0, np.inf
    bad = changed(write_packed(tmp_path / "inf", clip=clip), text_emb=vector_column(vectors, np.ones(10, bool)))
    with pytest.raises(HeadraceError, match="impossible vector in sample 000000006"):
        read_embeddings(bad, "train")
    bad = changed(write_packed(tmp_path / "weight", clip=clip), weight=np.array([1, -1] + [1] * 8, np.float32))
    with pytest.raises(HeadraceError, match="impossible weight in sample 000000001"):
        read_embeddings(bad, "train")
    with pytest.raises(HeadraceError, match="no CLIP vectors"):
        read_embeddings(write_packed(tmp_path / "none"), "train")


def test_vectors_of_another_clip_are_refused(tmp_path: Path, clip: Clip) -> None:
    folder = write_packed(tmp_path, clip=clip)
    check_identity(folder, clip)
    about = json.loads((folder / "dataset.json").read_text())
    about["clip"]["weights_sha256"] = "0" * 64
    (folder / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(HeadraceError, match="other weights") as caught:
        check_identity(folder, clip)
    assert caught.value.code == 4 and "--clip" in (caught.value.hint or "")


def test_kept_and_streamed_token_states_are_equal(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["", "a red circle", "word " * 60, "a red circle", "left and right of it all"]
    rows = np.array([1, 4, 0, 3])
    kept, mask = CaptionTokens(clip, captions).take(rows)
    monkeypatch.setattr(embedded, "KEEP_TOKENS", 0)
    streamed, same = CaptionTokens(clip, captions).take(rows)
    assert torch.equal(mask, same) and kept.shape[1] == clip.context_length and kept.dtype == torch.float16
    torch.testing.assert_close(kept, streamed, atol=2e-3, rtol=1e-3)
    expected, whole = clip.text_states([captions[1]])
    torch.testing.assert_close(kept[0][mask[0]].float(), torch.from_numpy(expected[whole]), atol=5e-3, rtol=5e-3)
    assert not kept[~mask].any()


def test_all_batches_of_a_set_are_as_long_as_its_longest_caption_needs(clip: Clip) -> None:
    tokens = CaptionTokens(clip, ["a red circle", "left and right of it all, and more", "a"])
    for rows in ([0], [1], [0, 2], [2, 1, 0]):
        states, mask = tokens.take(np.array(rows))
        assert states.shape[:2] == mask.shape == (len(rows), 16)
