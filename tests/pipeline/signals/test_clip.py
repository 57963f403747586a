"""The cosine, the vectors, rows without caption, and the identity found without loading anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.base import HeadraceError
from pipeline.clip import load as load_clip
from pipeline.shards import vectors
from pipeline.signals import Picture, SignalOptions
from pipeline.signals.clip import ClipSignal, identity, load, settings
from tests.pipeline.factory import picture
from tests.pipeline.test_clip import TINY, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "tiny", TINY)


@pytest.fixture(scope="module")
def signal(folder: Path) -> ClipSignal:
    return load(SignalOptions(clip=str(folder), device="cpu"))


def test_cosine_and_vectors_are_those_of_the_wrapper(signal: ClipSignal, folder: Path) -> None:
    pictures, texts = [np.asarray(picture(seed, 50 + seed)) for seed in range(3)], ["a", None, "a blue star"]
    rows = [Picture({"caption": text}, each) for each, text in zip(pictures, texts, strict=True)]
    table = signal.columns([signal.look(row) for row in rows])
    clip = load_clip(str(folder), "cpu")
    images, words = clip.encode_images(pictures), clip.encode_texts(["a", "a blue star"])
    assert table["clip_sim"].to_pylist() == pytest.approx([images[0] @ words[0], None, images[2] @ words[1]], abs=1e-6)
    assert table["text_emb"].is_null().to_pylist() == [False, True, False]
    assert np.abs(vectors(table["image_emb"]) - images).max() < 1e-3
    assert np.abs(vectors(table["text_emb"])[[0, 2]] - words).max() < 1e-3
    assert table["image_emb"].type.list_size == TINY["model_cfg"]["embed_dim"]  # type: ignore[index]


def test_nothing_has_a_caption(signal: ClipSignal) -> None:
    table = signal.columns([signal.look(Picture({"caption": None}, np.asarray(picture(0))))])
    assert table["clip_sim"].to_pylist() == table["text_emb"].to_pylist() == [None]
    assert table["image_emb"].null_count == 0


def test_no_pixels_no_vectors(signal: ClipSignal) -> None:
    assert signal.look(Picture({"caption": "a"}, None, "corrupt")) is None


def test_the_metadata_says_which_clip_and_where(signal: ClipSignal, folder: Path) -> None:
    made_by = json.loads(signal.schema().metadata[b"clip"])
    assert made_by == {"identity": identity(str(folder)), "device": "cpu"}


@pytest.mark.parametrize("resize", [{"resize_mode": "longest", "fill_color": 7}, {"interpolation": "bilinear"}, {}])
def test_identity_from_files_is_that_of_the_loaded_clip(tmp_path: Path, resize: dict[str, object]) -> None:
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2], **resize}
    folder = write_clip(tmp_path / "other", TINY | {"preprocess_cfg": preprocess})
    assert identity(str(folder)) == load_clip(str(folder), "cpu").identity


def test_a_directory_that_says_less_is_loaded_for_its_identity(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "terse", TINY | {"preprocess_cfg": {}})
    assert identity(str(folder)) == load_clip(str(folder), "cpu").identity


def test_settings_follow_the_weights_and_import_nothing_heavy(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.signals import SignalOptions; from pipeline.signals.clip import settings\n"
        f"settings(SignalOptions(clip={str(folder)!r})); print(*{{'torch', 'open_clip', 'numpy'}} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    before = settings(SignalOptions(clip=str(folder)))
    assert before == settings(SignalOptions(clip=f"{folder}/../tiny", device="cuda"))
    other = write_clip(tmp_path / "tiny", TINY)
    weights = other / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert before != settings(SignalOptions(clip=str(other)))


def test_a_clip_that_does_not_exist_is_named() -> None:
    with pytest.raises(HeadraceError, match="no CLIP called nowhere/at/all"):
        settings(SignalOptions(clip="nowhere/at/all"))
