"""Resume, refusal, balance, and damage between stages; with real files and real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.base import HeadraceError, write_bytes
from pipeline.books import books, read_markers
from pipeline.engine import Part, Shard, one_run, run_stage
from pipeline.shards import DataDir, shard_name


@dataclass(frozen=True)
class Copy:
    """A small real stage: copies `in/NAME` to `out/NAME`, upper-cased, and logs that it ran."""

    data: DataDir
    suffix: str = ""
    lose: int = 0
    die_on: str = ""

    def __call__(self, shard: Shard) -> dict[str, Part]:
        if shard.name == self.die_on:
            os.kill(os.getpid(), signal.SIGKILL)
        text = (self.data.root / shard.inputs[0]).read_text()
        with (self.data.root / "log").open("a") as log:
            log.write(f"{shard.name}\n")
        write_bytes(self.data.root / f"out/{shard.name}", (text.upper() + self.suffix).encode())
        return {"copy": Part({"kept": len(text) - 1 - self.lose, "dropped": 1}, (f"out/{shard.name}",))}


@dataclass(frozen=True)
class Source:
    data: DataDir

    def __call__(self, shard: Shard) -> dict[str, Part]:
        write_bytes(self.data.root / f"in/{shard.name}", f"text{shard.name}".encode())
        return {"source": Part({"all": shard.rows or 0}, (f"in/{shard.name}",))}


def make(tmp_path: Path, count: int = 4) -> tuple[DataDir, list[Shard]]:
    data = DataDir(tmp_path / "d")
    run_stage(data, {"source": {}}, Source(data), [Shard(shard_name(i), 9) for i in range(count)])
    return data, [Shard(shard_name(i), 9, (f"in/{shard_name(i)}",)) for i in range(count)]


def log(data: DataDir) -> list[str]:
    path = data.root / "log"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(lines)


def test_a_second_run_finds_nothing_to_do_and_the_books_stay(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    first = run_stage(data, {"copy": {"a": 1}}, Copy(data), shards)
    assert len(log(data)) == 4 and first.fates == {"kept": 32, "dropped": 4}
    second = run_stage(data, {"copy": {"a": 1}}, Copy(data), shards)
    assert log(data) == [] and second.fates == first.fates and second.done == 0
    assert "nothing to do" in second.sentence()
    assert books(data, "copy").rows == 36


def test_only_what_changed_is_redone(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    run_stage(data, {"copy": {}}, Copy(data), shards)
    log(data)
    (data.root / "out/00002").unlink()
    (data.root / "out/00001").write_text("short")
    run_stage(data, {"copy": {}}, Copy(data), shards)
    assert log(data) == ["00001", "00002"]
    run_stage(data, {"copy": {"suffix": "!"}}, Copy(data, "!"), shards)
    assert log(data) == ["00000", "00001", "00002", "00003"]


def test_a_changed_input_makes_what_follows_stale(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    run_stage(data, {"copy": {}}, Copy(data), shards)
    log(data)
    (data.markers / "source/00003.json").unlink()

    def other(shard: Shard) -> dict[str, Part]:
        write_bytes(data.root / f"in/{shard.name}", b"different")
        return {"source": Part({"all": 9}, (f"in/{shard.name}",))}

    run_stage(data, {"source": {}}, other, [Shard(shard_name(i), 9) for i in range(4)])
    run_stage(data, {"copy": {}}, Copy(data), shards)
    assert log(data) == ["00003"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_between_stages_is_named(tmp_path: Path, damage: str) -> None:
    data, shards = make(tmp_path)
    path = data.root / "in/00001"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if damage == "truncated" else b"X"))
    with pytest.raises(HeadraceError, match="in/00001") as caught:
        run_stage(data, {"copy": {}}, Copy(data), shards)
    assert caught.value.code == 3 and caught.value.hint
    assert "00001" not in read_markers(data, "copy")


def test_books_that_do_not_balance_mark_nothing(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    with pytest.raises(HeadraceError, match="took in 9 rows but accounts for 8"):
        run_stage(data, {"copy": {}}, Copy(data, lose=1), shards)
    assert read_markers(data, "copy") == {}


def test_other_settings_are_refused_where_bytes_cannot_be_remade(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    run_stage(data, {"copy": {"size": 1}}, Copy(data), shards, refuse_change=True)
    with pytest.raises(HeadraceError, match=r"other settings \(size of `copy`\)") as caught:
        run_stage(data, {"copy": {"size": 2}}, Copy(data), shards, refuse_change=True)
    assert caught.value.code == 4 and "--redo" in str(caught.value.hint)


def test_shards_that_no_longer_exist_leave_nothing(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    run_stage(data, {"copy": {}}, Copy(data), shards)
    run_stage(data, {"copy": {}}, Copy(data), shards[:2])
    assert sorted(os.listdir(data.root / "out")) == ["00000", "00001"]
    assert sorted(read_markers(data, "copy")) == ["00000", "00001"]


def test_two_workers_give_the_same_files_as_one(tmp_path: Path) -> None:
    outputs = []
    for workers in (1, 2):
        data, shards = make(tmp_path / str(workers))
        run_stage(data, {"copy": {}}, Copy(data), shards, workers=workers)
        outputs.append({p.name: p.read_bytes() for p in (data.root / "out").iterdir()})
        outputs.append({k: replace(m, seconds=0.0) for k, m in read_markers(data, "copy").items()})
    assert outputs[0] == outputs[2] and outputs[1] == outputs[3]


def test_a_killed_worker_is_a_sentence_and_a_later_run_finishes(tmp_path: Path) -> None:
    data, shards = make(tmp_path)
    with pytest.raises(HeadraceError, match="a worker died on shard"):
        run_stage(data, {"copy": {}}, Copy(data, die_on="00003"), shards, workers=2)
    assert run_stage(data, {"copy": {}}, Copy(data), shards, workers=2).shards == 4


def test_two_runs_on_one_folder_are_refused_and_leftovers_swept(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "d")
    code = f"""
        import sys
        from pathlib import Path
        from pipeline.engine import one_run
        from pipeline.shards import DataDir
        with one_run(DataDir(Path({str(data.root)!r}))):
            print("in", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=-1, stdout=-1)
    assert other.stdout and other.stdout.readline() == b"in\n"
    with pytest.raises(HeadraceError, match=f"process {other.pid}") as caught, one_run(data):
        pass
    assert caught.value.code == 4
    (data.root / "raw/.00001.tmp").mkdir(parents=True)
    (data.root / "raw/.x.1.tmp").write_text("half")
    inner = data.root / "mine/raw/.00003.tmp"  # another run may be at work in a folder below
    inner.mkdir(parents=True)
    other.kill()
    other.wait()
    with one_run(data):
        assert os.listdir(data.root / "raw") == []
        assert inner.is_dir()
