"""Two processes under torchrun: they learn what one does, stop together, and end in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base import write_toml
from tests.trainer.tiny_run import TINY, TRAINING
from tests.trainer.toy import SETTINGS, Toy, state, train, trained_rows
from trainer import checkpoint
from trainer.loop import STATE

RANKS = """
import sys, time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from pipeline.base import HeadraceError
from tests.trainer.toy import SETTINGS, Toy, plan
from trainer.loop import Loop
from trainer.processes import processes

def gloo():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):
            names.append(path.read_text())
    return [name for name in names if "gloo" in name]

def ended():
    for _ in range(50):  # a thread that has ended may be listed for a moment
        if not gloo():
            return True
        time.sleep(0.1)
    return False

class Damaged(Toy):
    def read(self, rows):
        if folder.name == "damaged" and len(self.seen) > 4:
            raise HeadraceError("damaged")
        return super().read(rows)

folder = Path(sys.argv[1])
task = Damaged(dropout=0.0)
training = SETTINGS.model_copy(update={"optimizer": "adamw", "compile": folder.name == "compiled"})
told = []
try:
    with processes() as place:
        loop = Loop(task, plan(folder / "two", training=training), replace(place, half=False), print)
        there = bool(gloo()) or sys.platform != "linux"
        loop.run()
except HeadraceError as error:
    told = [error.message, ended()]
(folder / f"rows{place.rank}").write_text(repr([rows for rows in task.seen if len(rows) == 4]))
(folder / f"told{place.rank}").write_text(repr([there, ended(), *told]))
"""


def torchrun(folder: Path) -> list[list[Any]]:
    """Run RANKS as two processes; what each tells at its end: the group's threads were there, and ended with it."""
    folder.mkdir()
    (folder / "ranks.py").write_text(RANKS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    program = Path(sys.executable).with_name("torchrun")
    command = [program, "--standalone", "--nproc-per-node=2", folder / "ranks.py", folder]
    subprocess.run(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=120)
    return [literal_eval((folder / f"told{rank}").read_text()) for rank in range(2)]


def test_two_processes_learn_what_one_does_from_the_same_rows(tmp_path: Path) -> None:
    assert torchrun(tmp_path / "ranks") == [[True, True]] * 2  # and the group's threads end with it
    training = SETTINGS.model_copy(update={"optimizer": "adamw"})
    task, _ = train(tmp_path / "one", Toy(dropout=0.0), training=training)
    halves = [literal_eval((tmp_path / "ranks" / f"rows{rank}").read_text()) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == trained_rows(task)
    (one, _), (two, _) = state(tmp_path / "one"), state(tmp_path / "ranks" / "two")
    assert set(one) == set(two) and not any("module." in name for name in two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_an_error_in_two_processes_leaves_no_thread_that_could_abort_them(tmp_path: Path) -> None:
    assert torchrun(tmp_path / "damaged") == [[True, True, "damaged", True]] * 2


@pytest.mark.slow
def test_two_processes_that_are_compiled_learn_alike(tmp_path: Path) -> None:
    torchrun(tmp_path / "compiled")
    torchrun(tmp_path / "ranks")
    (fast, _), (plain, _) = state(tmp_path / "compiled/two"), state(tmp_path / "ranks/two")
    assert set(fast) == set(plain) and not any("_orig_mod" in name or "module." in name for name in fast)
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-3, rtol=1e-3)


def test_ctrl_c_under_torchrun_keeps_the_step_in_hand(shards: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "steps": 100_000, "evaluate_every": 100_000}  # no state but what Ctrl-C leaves
    write_toml(tmp_path / "tiny.toml", {"decoder": {**TINY["decoder"], "training": training}})
    trainer = Path(sys.executable).with_name("trainer")
    asked = ["--shards", shards, "--out", tmp_path / "run", "--config", tmp_path / "tiny.toml", "--only", "decoder"]
    start = [trainer.with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", trainer, "fit"]
    here = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    state_file = tmp_path / "run" / "decoder" / STATE
    command = [*map(str, [*start, *asked])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=here) as process:
        assert process.stderr
        while not process.stderr.readline().startswith("decoder 10/") and process.poll() is None:
            pass
        assert not state_file.exists()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    assert process.returncode != 0 and checkpoint.scalars(state_file)["step"] >= 10
    again = [*command, "--resume", "--max-minutes", "0"]
    done = subprocess.run(again, capture_output=True, text=True, env=here, timeout=120)
    assert done.returncode == 1 and "decoder: resumed at step" in done.stderr
