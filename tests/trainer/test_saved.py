"""A run's models on disk: what belongs to them is found wherever the run lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.clip import Clip
from trainer.saved import read_run, write_run


def test_a_run_finds_its_set_and_its_clip_from_anywhere(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, and after the directory that holds all of them was moved."""
    (tmp_path / "here/elsewhere").mkdir(parents=True)
    (tmp_path / "here/clip").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_run(Path("runs/a"), "clip", clip.identity, Path("data/curated"), "")
    said = read_run(Path("runs/a"))
    assert (said["clip"], said["shards"]) == ("clip", "data/curated")
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there/elsewhere")
    said = read_run(Path("../runs/a"))
    assert (said["clip"], said["shards"]) == ("../clip", "../data/curated")
    Path("mini").mkdir()
    for name, kept in (("mini", "mini"), ("local-dir:../clip", "../clip"), ("ViT-B-32:openai", "ViT-B-32:openai")):
        write_run(Path("run"), name, clip.identity, tmp_path / "set", "")
        said = read_run(Path("run"))
        assert (said["clip"], said["shards"]) == (kept, str(tmp_path / "set"))  # an absolute place stays


def test_a_run_of_an_earlier_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"clip": "./a", "identity": {}, "shards": "data/curated"}))
    assert read_run(tmp_path) == {"clip": "./a", "identity": {}, "shards": "data/curated"}
