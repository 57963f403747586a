"""`kill -9` at any moment, run again: every file as if nothing had happened; with 1 and 2 workers alike."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import kill
from benchmarks.kill import Bench, Kill, kills

SMALL = """
[miniweb]
rows = 24
faults = false

[download]
shard_size = 6

[score]
signals = ["phash", "image"]

[pack]
shard_size = 8
"""


@pytest.fixture
def compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a short run is imports: let the first one compile for all, even where Python is told to keep nothing."""
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@pytest.mark.usefixtures("compiled_once")
def test_a_run_killed_in_download_or_pack_ends_as_if_undisturbed(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL)
    runs = Bench(recipe, tmp_path)
    runs.refer(workers=1)
    assert {"curated/dataset.json", "raw/00003.tar", "decisions/dedup.parquet"} <= runs.files.keys()
    for number, chosen in enumerate((Kill("download", 0.85, 1, True), Kill("pack", 0.5, 2, False))):
        trial = runs.killed(number, chosen)
        assert trial.during is not None
        assert (trial.different, trial.findings) == ((), 0)


def test_a_difference_is_seen(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "curated").mkdir(parents=True)
        (tmp_path / folder / "curated" / "dataset.json").write_text(folder)
        (tmp_path / folder / "raw").mkdir()
        (tmp_path / folder / "raw" / "00000_stats.json").write_text(folder)
    one, two = (kill.digests(tmp_path / folder) for folder in ("one", "two"))
    assert one.keys() == two.keys() == {"curated/dataset.json"}
    assert one != two


def test_kills_lie_all_over_the_run_and_in_each_short_stage() -> None:
    lasted = {"download": 40.0, "score": 30.0, "filter": 1.0, "dedup": 1.0, "pack": 4.0, "report": 4.0}
    found = kills(lasted, 20, random.Random(0))
    starts = {stage: sum(list(lasted.values())[:i]) for i, stage in enumerate(kill.STAGES)}
    spread = [starts[m.stage] + m.part * lasted[m.stage] for m in found[::2]]
    assert [int(at // 8) for at in spread] == list(range(10))
    assert {m.stage for m in found} == {*kill.STAGES}
    assert all(0 <= m.part <= 1 for m in found)
    assert len({(m.workers, m.whole_group) for m in found}) == 4
    assert found == kills(lasted, 20, random.Random(0)) != kills(lasted, 20, random.Random(1))


@pytest.mark.slow
def test_twenty_kills_of_the_mini_web(tmp_path: Path) -> None:
    recipe = Path(kill.__file__).with_suffix(".toml")
    trials = kill.bench(recipe, tmp_path, count=20, seed=0, jobs=1)
    assert len(trials) == 21
    assert [trial for trial in trials if trial.different or trial.findings] == []
