"""A packed set opens in what others use: webdataset, Hugging Face datasets, open_clip's trainer, DuckDB, pandas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipeline.shards import DataDir, read_parquet
from tests.pipeline.packing import packed, raw_table, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataDir:
    return packed(tmp_path_factory.mktemp("packed"), rows(60, NSFW="unlikely", WIDTH=7), shard_size=27)


def captions(data: DataDir, split: str) -> list[str]:
    files = sorted((data.curated / split).glob("*.parquet"))
    return [caption for path in files for caption in read_parquet(path)["caption"].to_pylist()]


def test_webdataset(data: DataDir) -> None:
    import webdataset

    shards = str(data.curated / "train" / "{00000..00001}.tar")
    found = list(
        webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
    )
    assert [text for _, _, text, _ in found] == captions(data, "train")
    assert all(isinstance(image, Image.Image) and image.size == (48, 48) for _, image, _, _ in found)
    assert all(facts["caption"] == text and facts["width"] == 48 for _, _, text, facts in found)


READ = """
import sys
from datasets import load_dataset
folder, streaming = sys.argv[1], sys.argv[2] == "True"
found = load_dataset(folder, streaming=streaming)
for split in found:
    for sample in found[split]:
        picture = next(sample[name] for name in ("jpg", "png", "webp") if sample.get(name) is not None)
        assert sample["json"]["caption"] == sample["txt"], sample
        print(split, sample["__key__"], type(picture).__name__, picture.size, sample["txt"], sep="|")
"""


def hugging_face(folder: Path, cache: Path, streaming: bool) -> list[list[str]]:
    """What `load_dataset` gives, in a process of its own: the library reads its settings once."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [sys.executable, "-c", READ, str(folder), str(streaming)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_gives_pictures(data: DataDir, tmp_path: Path, streaming: bool) -> None:
    found = hugging_face(data.curated, tmp_path, streaming)
    for split, name in (("train", "train"), ("val", "validation")):
        assert [row[4] for row in found if row[0] == name] == captions(data, split)
    assert {(row[2], row[3]) for row in found} == {("JpegImageFile", "(48, 48)")}


def test_hugging_face_without_val(tmp_path: Path) -> None:
    small = packed(tmp_path / "set", rows(6))
    found = hugging_face(small.curated, tmp_path / "cache", streaming=True)
    assert [row[0] for row in found] == ["train"] * 6


def test_open_clips_own_reader(data: DataDir) -> None:
    import torch
    from open_clip_train.data import get_wds_dataset
    from torchvision.transforms import ToTensor

    shards = str(data.curated / "train" / "{00000..00001}.tar")
    settings = {"train_data": shards, "val_data": shards, "train_num_samples": 54, "val_num_samples": 54}
    settings |= {"dataset_resampled": False, "train_data_upsampling_factors": None, "seed": 0, "batch_size": 9}
    arguments = SimpleNamespace(workers=0, world_size=1, **settings)
    seen: list[str] = []

    def tokenizer(text: str) -> Any:
        seen.append(text)
        return torch.tensor([[len(text)]])

    for is_train in (True, False):
        seen.clear()
        info = get_wds_dataset(arguments, ToTensor(), is_train, tokenizer=tokenizer)
        shapes = [tuple(images.shape) for images, _ in info.dataloader]
        assert shapes == [(9, 3, 48, 48)] * 6
        assert sorted(seen) == sorted(captions(data, "train"))


def test_duckdb(data: DataDir) -> None:
    import duckdb

    files = str(data.curated / "*" / "*.parquet")
    query = "SELECT count(*), count(DISTINCT key), min(width), min(source_WIDTH), sum(weight), min(len(image_emb)) "
    query += "FROM read_parquet($files) WHERE clip_sim IS NOT NULL AND NSFW = 'unlikely'"
    assert duckdb.execute(query, {"files": files}).fetchall() == [(60, 60, 48, 7, 60.0, 8)]
    dots = (
        "SELECT max(abs(clip_sim - list_dot_product(image_emb::FLOAT[], text_emb::FLOAT[]))) FROM read_parquet($files)"
    )
    row = duckdb.execute(dots, {"files": files}).fetchone()
    assert row is not None and row[0] < 2e-3


def test_pandas(data: DataDir) -> None:
    import pandas

    frames = [pandas.read_parquet(path) for path in sorted(data.curated.glob("*/*.parquet"))]
    frame = pandas.concat(frames)
    assert set(frame["key"]) == set(raw_table(data)["key"].to_pylist())
    assert frame["image_emb"].iloc[0].shape == (8,) and frame["weight"].eq(1).all()


def test_a_picture_is_read_by_its_offset_alone(data: DataDir) -> None:
    import io

    path = data.curated / "train" / "00001.parquet"
    row = read_parquet(path).to_pylist()[5]
    with path.with_suffix(".tar").open("rb") as file:
        file.seek(row["offset"])
        assert Image.open(io.BytesIO(file.read(row["length"]))).size == (48, 48)
