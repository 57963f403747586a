"""`trainer clip --lexicon`: a part of what a run is, and of the command on its card."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base import HeadraceError
from tests.trainer.packed import write_packed
from tests.trainer.test_fit_clip import run, silent, tiny
from trainer.cli import main
from trainer.clip_files import WEIGHTS
from trainer.fit_clip import fit

READOUT = tiny(steps=3, readout_steps=4, readout=["add"])


def lexicon(path: Path, *words: str) -> Path:
    kinds = pa.array([["colour"]] * len(words), pa.list_(pa.string()))
    pq.write_table(pa.table({"word": words, "kinds": kinds, "weights": [[1.0]] * len(words)}), path)
    return path


def test_a_run_with_a_lexicon_goes_on_with_the_same_only(tmp_path: Path) -> None:
    shards = write_packed(tmp_path / "set")
    path = lexicon(tmp_path / "kinds.parquet", "red", "green", "crimson")
    out = tmp_path / "out"
    assert not fit(run(shards, out, READOUT, lexicon=path, minutes=0.0), silent)
    other = lexicon(tmp_path / "other.parquet", "red", "green")
    for another in (None, other):
        with pytest.raises(HeadraceError, match="another config, seed, sets, lexicon"):
            fit(run(shards, out, READOUT, lexicon=another, resume=True), silent)
    assert fit(run(shards, out, READOUT, lexicon=path, resume=True), silent)
    assert f"--lexicon {path}" in (out / "README.md").read_text()
    for name, same in (("whole", path), ("plain", None)):
        assert fit(run(shards, tmp_path / name, READOUT, lexicon=same), silent)
    weights = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in ("out", "whole", "plain")}
    assert weights["out"] == weights["whole"] != weights["plain"]


def test_a_lexicon_that_is_not_there_or_for_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_packed(tmp_path / "set")
    with pytest.raises(HeadraceError, match="the config asks for none"):
        fit(run(shards, tmp_path / "out", tiny(), lexicon=lexicon(tmp_path / "kinds.parquet", "red")), silent)
    assert not (tmp_path / "out").exists()
    config = tmp_path / "config.json"
    config.write_text(READOUT.model_dump_json())
    arguments = ["clip", "--shards", str(shards), "--config", str(config), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["trainer", *arguments, "--lexicon", str(tmp_path / "none.parquet")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3 and "there is no lexicon" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
