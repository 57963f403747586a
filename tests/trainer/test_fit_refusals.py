"""What `trainer fit` says on the command line where it cannot train: two lines, an exit code, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.base import write_toml
from pipeline.clip import Clip
from pipeline.shards import read_parquet, vector_column, write_parquet
from tests.trainer.packed import small_files, write_packed
from tests.trainer.tiny_run import TINY
from trainer import checkpoint
from trainer.cli import main
from trainer.loop import STATE

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    write_toml(tmp_path / "tiny.toml", TINY)

    def run_main(shards: Path, out: Path, *more: str) -> tuple[int, str]:
        asked = ["fit", "--shards", shards, "--out", out, "--config", tmp_path / "tiny.toml", *more]
        monkeypatch.setattr("sys.argv", ["trainer", *map(str, asked)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return run_main


def of_another_clip(packed: Path) -> None:
    about = json.loads((packed / "dataset.json").read_text())
    about["clip"]["weights_sha256"] = "0" * 64
    (packed / "dataset.json").write_text(json.dumps(about))


def without_val(packed: Path) -> None:
    for path in (packed / "val").iterdir():
        path.unlink()


def without_a_tar(packed: Path) -> None:
    (packed / "train/00001.tar").unlink()


def with_a_tar_cut_short(packed: Path) -> None:
    tar = packed / "train/00000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])


def with_nan(packed: Path) -> None:
    path = packed / "train/00001.parquet"
    table = read_parquet(path)
    values = np.stack(table["image_emb"].to_numpy(zero_copy_only=False)).astype(np.float32)
    values[2, 7] = np.nan
    place = table.column_names.index("image_emb")
    write_parquet(table.set_column(place, "image_emb", vector_column(values, np.ones(len(table), bool))), path)


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (of_another_clip, 4, "are of other weights than those of CLIP mini"),
        (without_val, 3, "has no samples in val"),
        (without_a_tar, 3, "00001.tar cannot be read: no such file"),
        (with_a_tar_cut_short, 3, "00000.tar cannot be read: it is cut short"),
        (with_nan, 4, "00001.parquet has an impossible vector in sample 000010002"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_set_that_cannot_be_trained_on(
    spoil: Callable[[Path], None], code: int, said: str, call: Call, clip: Clip, tmp_path: Path
) -> None:
    packed = write_packed(tmp_path / "set", clip=clip)
    spoil(packed)
    found, err = call(packed, tmp_path / "out")
    error, hint = err.splitlines()[-2:]
    assert found == code and error.startswith("error: ") and said in error and hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_one_sample(call: Call, clip: Clip, tmp_path: Path) -> None:
    code, err = call(write_packed(tmp_path / "set", rows=1, clip=clip), tmp_path / "out")
    assert code == 2 and "error: " in err and "has only one sample to train on" in err.splitlines()[-2]


def test_a_checkpoint_of_another_config_and_a_run_that_is_there(call: Call, shards: Path, tmp_path: Path) -> None:
    assert call(shards, tmp_path / "out", "--only", "prior")[0] == 0
    before = (tmp_path / "out/prior" / STATE).read_bytes()
    code, err = call(shards, tmp_path / "out", "--only", "prior", "--resume", "--set", "prior.width=16")
    assert code == 4 and "is of another config, seed, set or CLIP" in err
    code, err = call(shards, tmp_path / "out", "--only", "prior")
    assert code == 4 and "already holds a prior" in err and "--resume" in err.splitlines()[-1]
    assert (tmp_path / "out/prior" / STATE).read_bytes() == before


def test_no_room_for_a_state_leaves_the_last_one(call: Call, shards: Path, tmp_path: Path) -> None:
    asked = (shards, tmp_path / "out", "--only", "decoder")
    assert call(*asked, "--max-minutes", "0")[0] == 1
    state = tmp_path / "out/decoder" / STATE
    before, size = state.read_bytes(), state.stat().st_size
    with small_files(size - 1):  # room for the model
        code, err = call(*asked, "--resume")
    error, hint = err.splitlines()[-2:]
    assert code == 1 and "cannot write" in error and STATE in error and hint.startswith("hint: ")
    assert state.read_bytes() == before and checkpoint.scalars(state)["step"] == 1
    assert call(*asked, "--resume")[0] == 0
