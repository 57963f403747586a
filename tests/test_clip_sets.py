"""The sets of the embedded CLIP: nothing that measures it is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import clip, clip_sets
from pipeline.base import file_sha256
from pipeline.miniweb import scenes

SHAPES = set(scenes.SHAPES)


def bag(text: str) -> set[str]:
    return {"a" if word == "an" else word for word in text.lower().replace(".", "").replace(",", "").split()}


def rows(folder: Path) -> list[dict[str, str]]:
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


def test_what_is_measured_is_what_is_left_out() -> None:
    names = [f"{part}/{number}.png" for part in ("openclipart", "emoji", "stamps") for number in range(400)]
    for name in names:
        assert clip.measured(name) == (clip_sets.is_held_out(name) or name.startswith("stamps/"))
    held = sum(map(clip_sets.is_held_out, names))
    assert 60 < held < 140 and not any(clip_sets.is_held_out(name) for name in names if name.startswith("emoji/"))
