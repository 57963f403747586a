"""Rows stay aligned, bytes do not depend on workers, signals do not depend on each other, and damage is named."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import score
from pipeline.base import HeadraceError
from pipeline.books import read_markers
from pipeline.engine import Shard
from pipeline.images import ImageSandbox
from pipeline.score import ScoreConfig, run
from pipeline.shards import DataDir, read_parquet, read_tar
from pipeline.signals import SignalOptions, signal_names
from tests.pipeline.factory import Row, jpeg, make_raw, picture
from tests.pipeline.test_clip import TINY, write_clip

ROWS = [
    Row(picture(0), "a red circle"),
    Row(None, "never fetched"),
    Row(picture(1), None),
    Row(jpeg(picture(2))[:700], "cut short"),
    Row(picture(3, side=150), "IMG_0001.jpg"),
    Row(b"<html>no picture</html>", "a page"),
    Row(picture(4), "   "),
    Row(None, None, error="timeout"),
    *(Row(picture(seed), f"picture number {seed}") for seed in range(5, 14)),
    *(Row(None, "a whole shard failed") for _ in range(8)),
]
SHARDS = 4
PIXEL_SIGNALS = {"clip", "image", "phash", "safety"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip(tmp_path_factory.mktemp("clips") / "tiny", TINY))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, clip: str) -> DataDir:
    """All signals, by one worker."""
    data = make_raw(tmp_path_factory.mktemp("scored"), ROWS)
    run(ScoreConfig(clip=clip), data)
    return data


@pytest.fixture
def copy(scored: DataDir, tmp_path: Path) -> DataDir:
    shutil.copytree(scored.root, tmp_path / "data")
    return DataDir(tmp_path / "data")


def files(data: DataDir, pattern: str = "**/*.parquet") -> dict[str, str]:
    found = sorted(data.signals.glob(pattern))
    return {str(path.relative_to(data.signals)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def column(data: DataDir, signal: str, name: str) -> list[Any]:
    tables = [read_parquet(path) for path in sorted((data.signals / signal).glob("*.parquet"))]
    return [value for table in tables for value in table[name].to_pylist()]


def raw(data: DataDir) -> Iterator[dict[str, Any]]:
    for path in sorted(data.raw.glob("*.parquet")):
        yield from read_parquet(path).to_pylist()


def test_every_signal_has_every_raw_row_in_order(scored: DataDir) -> None:
    keys = [row["key"] for row in raw(scored)]
    assert {path.name for path in scored.signals.iterdir()} == set(signal_names()) > PIXEL_SIGNALS
    for name in signal_names():
        assert column(scored, name, "key") == keys
        assert pq.read_schema(scored.signals / name / "00000.parquet").names[0] == "key"


def test_values_stand_in_the_row_of_their_picture(scored: DataDir) -> None:
    hashes = column(scored, "phash", "phash")
    for row, value in zip(ROWS, hashes, strict=True):
        if row.image is None or isinstance(row.image, bytes):
            assert value is None
        else:
            exact = int(str(imagehash.phash(row.image)), 16)
            assert (value ^ exact).bit_count() <= 4  # what JPEG moves
    assert column(scored, "caption", "words")[:6] == [3, None, None, 2, 1, 2]


def test_one_decode_gives_what_the_stored_bytes_give(scored: DataDir) -> None:
    from PIL import Image

    body = next(read_tar(scored.raw / "00000.tar")).image()
    with ImageSandbox(score.LIMITS) as sandbox:
        pixels = sandbox.decode(body or b"")
    assert isinstance(pixels, np.ndarray)
    assert column(scored, "phash", "phash")[0] == int(str(imagehash.phash(Image.fromarray(pixels))), 16)


def test_a_picture_that_cannot_be_decoded_is_a_row_with_its_error(scored: DataDir) -> None:
    errors = column(scored, "image", "decode_error")
    assert [i for i, error in enumerate(errors) if error] == [3, 5]
    assert errors[3].startswith("corrupt") and errors[5].startswith("not_an_image")
    for signal, name in (("image", "entropy"), ("clip", "image_emb"), ("clip", "clip_sim"), ("safety", "nsfw")):
        values = column(scored, signal, name)
        assert [values[i] for i in (1, 3, 5, 7)] == [None] * 4
        assert values[0] is not None and values[8] is not None


def test_without_caption_there_is_a_vector_but_no_similarity(scored: DataDir) -> None:
    for position in (2, 6):
        assert column(scored, "clip", "image_emb")[position] is not None
        assert column(scored, "clip", "clip_sim")[position] is None
        assert column(scored, "clip", "text_emb")[position] is None


def test_each_signal_accounts_for_every_row(scored: DataDir) -> None:
    first = {name: read_markers(scored, f"score/{name}")["00000"].fates for name in signal_names()}
    pixels = {"no_picture": 2, "undecodable": 2, "scored": 4}
    assert first["image"] == first["phash"] == first["safety"] == pixels
    assert first["clip"] == {"no_picture": 2, "undecodable": 2, "no_caption": 2, "scored": 2}
    assert first["caption"] == {"no_picture": 2, "no_caption": 2, "scored": 4}
    assert read_markers(scored, "score/clip")["00003"].fates == {"no_picture": 1}


def test_two_workers_and_any_thread_count_write_the_same_bytes(scored: DataDir, clip: str, tmp_path: Path) -> None:
    data = make_raw(tmp_path / "other", ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        run(ScoreConfig(clip=clip), data, workers=2)
        assert files(data) == files(scored)
        shutil.rmtree(data.signals)
        run(ScoreConfig(clip=clip), data)
        assert files(data) == files(scored)
        assert torch.get_num_threads() != threads  # left as it was found
    finally:
        torch.set_num_threads(threads)


def test_signals_together_or_one_by_one_write_the_same_bytes(scored: DataDir, clip: str, tmp_path: Path) -> None:
    data, times = make_raw(tmp_path / "other", ROWS), {}
    for name in reversed(signal_names()):
        run(ScoreConfig(clip=clip, signals=[name]), data)
        assert times == {path: (data.signals / path).stat().st_mtime_ns for path in times}
        times = {path: (data.signals / path).stat().st_mtime_ns for path in files(data)}
    assert files(data) == files(scored)


def test_a_second_run_does_nothing(copy: DataDir, clip: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.root.rglob("*.parquet")}
    summary = run(ScoreConfig(clip=clip), copy)
    assert (summary.stage, summary.done, summary.shards, summary.rows) == ("score", 0, SHARDS, len(ROWS))
    assert before == {path: path.stat().st_mtime_ns for path in copy.root.rglob("*.parquet")}


def test_another_clip_redoes_clip_alone(copy: DataDir, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "other", TINY | {"preprocess_cfg": {"mean": [0.1] * 3, "std": [1.0] * 3}})
    before = {path: (copy.signals / path).stat().st_mtime_ns for path in files(copy)}
    assert run(ScoreConfig(clip=str(other)), copy).done == SHARDS
    changed = {path for path in before if (copy.signals / path).stat().st_mtime_ns != before[path]}
    assert changed == {path for path in before if path.startswith("clip/")}


def test_a_lost_file_is_made_again_alone(copy: DataDir, clip: str) -> None:
    before = files(copy)
    (copy.signals / "image" / "00001.parquet").unlink()
    assert run(ScoreConfig(clip=clip), copy).done == 1
    assert files(copy) == before


def test_batches_end_with_the_shard_whatever_its_length(clip: str, tmp_path: Path) -> None:
    rows = [Row(picture(seed % 7, side=40), f"picture {seed % 7}") for seed in range(score.BATCH + 3)]
    data = make_raw(tmp_path / "long", rows, shard_size=len(rows))
    run(ScoreConfig(clip=clip, signals=["clip", "phash"]), data)
    hashes, cosines = column(data, "phash", "phash"), column(data, "clip", "clip_sim")
    assert hashes == [hashes[i % 7] for i in range(len(rows))]
    assert cosines == pytest.approx([cosines[i % 7] for i in range(len(rows))], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda keys: keys[1:], "where the tar has sample"),
        (lambda keys: keys[:-1], "where the tar has the end"),
        (lambda keys: [*keys, "000000999"], "does not list sample 000000999"),
        (lambda keys: keys[::-1], "where the tar has sample"),
    ],
)
def test_a_tar_that_is_not_its_table_s_is_named(change: Any, found: str, tmp_path: Path) -> None:
    from pipeline.shards import TarWriter

    data = make_raw(tmp_path, [Row(picture(seed), "x") for seed in range(3)])
    with (data.raw / "00000.tar").open("wb") as file:
        tar = TarWriter(file)
        for key in change([f"{i:09d}" for i in range(3)]):
            tar.add(f"{key}.jpg", jpeg(picture(0)))
        tar.close()
    stages = {"score/caption": {"version": 1}}
    with pytest.raises(HeadraceError, match=found) as caught:
        score.Score(data, SignalOptions(), stages)(Shard("00000", 3, stages=("score/caption",)))
    assert "00000.parquet and its tar disagree" in caught.value.message
    assert not data.signals.exists()


def test_a_damaged_shard_stops_the_stage_before_anything_is_written(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(picture(0), "x")])
    (data.raw / "00000.tar").write_bytes(b"short")
    with pytest.raises(HeadraceError, match=r"00000\.tar has 5 bytes"):
        run(ScoreConfig(signals=["caption"]), data)
    assert not data.signals.exists()


def test_captions_need_no_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_raw(tmp_path, [Row(picture(0), "a red circle"), Row(b"no picture", "a blue star")])
    monkeypatch.setattr(score, "ImageSandbox", None)
    run(ScoreConfig(signals=["caption"]), data)
    assert column(data, "caption", "words") == [3, 3]


def test_unknown_signals_and_no_raw_shards_are_said(tmp_path: Path) -> None:
    data = make_raw(tmp_path / "data", [Row(picture(0), "x")])
    with pytest.raises(HeadraceError, match="no signal called 'safty'") as caught:
        run(ScoreConfig(signals=["safty"]), data)
    assert caught.value.hint == "did you mean safety?"
    with pytest.raises(HeadraceError, match="no raw shards"):
        run(ScoreConfig(signals=["caption"]), DataDir(tmp_path / "empty"))


def test_a_new_signal_is_a_new_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.signals

    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "redness.py").write_text(
        "import pyarrow as pa\n"
        "def settings(options):\n    return {'version': 1}\n"
        "def load(options):\n    return Redness()\n"
        "class Redness:\n"
        "    reads = frozenset({'pixels'})\n"
        "    def schema(self):\n        return pa.schema([('redness', pa.float32())])\n"
        "    def look(self, picture):\n"
        "        return None if picture.pixels is None else float(picture.pixels[:, :, 0].mean())\n"
        "    def columns(self, seen):\n        return pa.table([pa.array(seen, pa.float32())], schema=self.schema())\n"
    )
    monkeypatch.setattr(pipeline.signals, "__path__", [*pipeline.signals.__path__, str(folder)])
    data = make_raw(tmp_path / "data", ROWS[:4])
    assert "redness" in ScoreConfig().signals
    run(ScoreConfig(signals=["redness"]), data)
    values = column(data, "redness", "redness")
    assert values[0] == pytest.approx(np.asarray(picture(0))[:, :, 0].mean(), abs=3)
    assert values[1] is None and values[3] is None
