"""The sets of the embedded CLIP: nothing that measures it is in them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from benchmarks import clip, clip_sets
from benchmarks.teacher import vectors
from benchmarks.views import views
from pipeline.base import file_sha256
from pipeline.miniweb import scenes
from trainer.data import open_set

SHAPES = set(scenes.SHAPES)


def bag(text: str) -> set[str]:
    return {"a" if word == "an" else word for word in text.lower().replace(".", "").replace(",", "").split()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def shown(uid: str) -> scenes.Scene:
    seed, index = map(int, uid.split("/"))
    return scenes.scene(seed, index)


def test_scenes_are_written_anew_and_no_held_out_one_is_trained_on(tmp_path: Path) -> None:
    for count in (40, 24):
        clip_sets.write_scenes(tmp_path / "scenes", count, val=6)
    train, val = (rows(tmp_path / "scenes" / split) for split in ("train", "val"))
    assert len(train) == 24 and len(val) == 6
    assert not any(scenes.held_out(shown(row["uid"])) for row in train)
    assert all(scenes.held_out(shown(row["uid"])) for row in val)
    files = json.loads((tmp_path / "scenes" / "dataset.json").read_text())["files"]
    assert sorted(files) == [f"{split}/00000.{kind}" for split in ("train", "val") for kind in ("parquet", "tar")]
    assert all(file_sha256(tmp_path / "scenes" / name) == value for name, value in files.items())


def test_wrong_shapes_are_exchanged_or_one_is_another_and_may_be_trained_on() -> None:
    left_out = 0
    for index in range(300):
        scene = scenes.scene(5, index)
        found = clip_sets.wrong_shapes(scene, index, index)
        true = bag(scenes.caption(scene, index))
        shapes = {thing.shape for thing in scene.objects}
        exchanged = [text for text in found if bag(text) == true]
        renamed = [bag(text) for text in found if bag(text) != true]
        assert len(exchanged) <= (len(shapes) == 2) and len(renamed) <= 1
        assert all(len((true - other) & SHAPES) <= 1 and (true - other) | (other - true) <= SHAPES for other in renamed)
        left_out += 1 + (len(shapes) == 2) - len(found)
    assert 0 < left_out < 60  # combinations that are held out


def test_views_are_of_a_splits_own_drawings_and_say_what_the_teacher_makes_of_them(tmp_path: Path) -> None:
    named = {"train": ["a disc", "a box"], "val": ["a line", "a cross"]}
    (tmp_path / "pictures").mkdir()
    for split, captions in named.items():
        for number in range(len(captions)):
            picture = Image.new("RGB", (90, 70), "white")
            ImageDraw.Draw(picture).ellipse((10, 10, 30 + 20 * number, 60), fill="red")
            picture.save(tmp_path / "pictures" / f"{split}{number}.png")
        folder = tmp_path / "clipart" / "curated" / split
        folder.mkdir(parents=True)
        urls = [f"{split}{number}.png" for number in range(len(captions))]
        pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "00000.parquet")
    clip_sets.write_views(tmp_path, "views", views, {"train": 8, "val": 3})
    for split, count in (("train", 8), ("val", 3)):
        found = rows(tmp_path / "views" / split)
        assert len(found) == count
        assert {part for row in found for part in row["caption"].split(", ")} <= set(named[split])
    train = open_set(tmp_path / "views", "train")
    shown = [Image.open(io.BytesIO(train.read(row))) for row in range(len(train))]
    taught = np.array([row["teacher"] for row in rows(tmp_path / "views" / "train")], np.float32)
    again = vectors(shown).astype(np.float32)
    assert taught.shape == (8, 2304)
    assert np.argmin(np.square(taught[:, None] - again[None]).sum(axis=2), axis=1).tolist() == list(range(8))


def test_what_is_measured_is_what_is_left_out() -> None:
    names = [f"{part}/{number}.png" for part in ("openclipart", "emoji", "stamps") for number in range(400)]
    for name in names:
        assert clip.measured(name) == (clip_sets.is_held_out(name) or name.startswith("stamps/"))
    held = sum(map(clip_sets.is_held_out, names))
    assert 60 < held < 140 and not any(clip_sets.is_held_out(name) for name in names if name.startswith("emoji/"))
