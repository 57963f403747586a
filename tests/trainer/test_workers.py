"""Reading beside training: order, errors, and that no process is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.base import MISSING, HeadraceError
from trainer.workers import Workers, read_ahead

ROOT = Path(__file__).parents[2]


def test_batches_read_ahead_come_in_order_and_errors_in_their_turn() -> None:
    begun: list[int] = []

    def read(step: int) -> int:
        begun.append(step)
        if step == 9:
            raise HeadraceError("a damaged tar")
        return step * step

    got = []
    for number, value in enumerate(read_ahead(read, range(7), 2)):
        got.append(value)
        assert len(begun) <= number + 3
    assert got == [step * step for step in range(7)] and begun == list(range(7))
    reading = read_ahead(read, range(8, 12), 2)
    assert next(reading) == 64
    with pytest.raises(HeadraceError, match="damaged"):
        next(reading)
    assert list(read_ahead(read, range(2), 5)) == [0, 1]
    begun.clear()
    cut_short = read_ahead(read, range(100), 2)
    assert next(cut_short) == 0
    cut_short.close()  # type: ignore[attr-defined]
    assert len(begun) <= 3


def numbered(row: int) -> torch.Tensor:
    """Whose process made it cannot be seen."""
    return torch.full((2, 3), row % 256, dtype=torch.uint8)


def own(row: int) -> torch.Tensor:
    """The process that made it, its threads, and whether it leaves Ctrl-C to its parent: its group is another."""
    facts = [*os.getpid().to_bytes(4, "little"), torch.get_num_threads(), os.getpgrp() == os.getpid()]
    return torch.tensor(facts, dtype=torch.uint8)


def ended(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_rows_come_as_asked_for_whatever_process_made_them() -> None:
    workers = Workers(numbered, (2, 3), room=500)
    asked = [np.arange(500), np.array([7, 7, 3]), np.arange(300)[::-1]]
    given = [workers.take(rows) for rows in asked]
    for rows, got in zip(asked, given, strict=True):  # all are looked at last: none changes under the next
        assert got.shape == (len(rows), 2, 3) and got.dtype == torch.uint8
        assert got[:, 1, 2].tolist() == (rows % 256).tolist()


def test_they_are_other_processes_of_one_thread_and_go_when_let_go() -> None:
    workers = Workers(own, (6,), room=64)
    made = workers.take(np.arange(64)).tolist()
    pids = {int.from_bytes(bytes(row[:4]), "little") for row in made}
    assert os.getpid() not in pids and {tuple(row[4:]) for row in made} == {(1, 1)}
    del workers
    gc.collect()
    assert all(ended(pid) for pid in pids)


def test_an_error_comes_as_it_was_raised_and_the_next_rows_are_made() -> None:
    def make(row: int) -> torch.Tensor:
        if row == 70:
            raise HeadraceError("a damaged tar", hint="look at it", code=MISSING)
        return numbered(row)

    workers = Workers(make, (2, 3), room=100)
    with pytest.raises(HeadraceError, match="a damaged tar") as caught:
        workers.take(np.arange(100))
    assert (caught.value.hint, caught.value.code) == ("look at it", MISSING)
    assert workers.take(np.arange(60))[:, 0, 0].tolist() == list(range(60))


def test_a_process_that_is_killed_is_told_in_a_sentence() -> None:
    def make(row: int) -> torch.Tensor:
        if row == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(row)

    with pytest.raises(HeadraceError, match="was killed from outside") as caught:
        Workers(make, (2, 3), room=8).take(np.arange(8))
    assert caught.value.code == 1 and "--resume" in str(caught.value.hint)


def test_they_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import os, signal; import numpy as np; from tests.trainer.test_workers import own; "
        "from trainer.workers import Workers; workers = Workers(own, (6,), 64); "
        "made = workers.take(np.arange(64)).tolist(); "
        "print({int.from_bytes(bytes(row[:4]), 'little') for row in made}, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = [int(text) for text in done.stdout.strip().strip("{}").split(",")]
    assert pids and all(ended(pid) for pid in pids)


def test_a_signal_to_the_whole_group_is_the_parents_alone() -> None:
    """As torchrun and `timeout` send it: the parent finishes its step, for which it may still read."""
    code = (
        "import os, signal; import numpy as np; from tests.trainer.test_workers import numbered; "
        "from trainer.loop import interruptible; from trainer.workers import Workers\n"
        "with interruptible() as asked:\n"
        "    workers = Workers(numbered, (2, 3), 64); workers.take(np.arange(64))\n"
        "    os.killpg(0, signal.SIGTERM)\n"
        "    assert asked.is_set() and workers.take(np.arange(64))[:, 0, 0].tolist() == list(range(64))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == 0, done.stderr


def test_few_rows_are_shared_among_all() -> None:
    def slow(row: int) -> torch.Tensor:
        time.sleep(0.05)
        return own(row)

    workers = Workers(slow, (6,), room=8)
    made = [{tuple(row[:4]) for row in workers.take(np.arange(8)).tolist()} for _ in range(4)]
    assert max(map(len, made)) >= min(2, os.cpu_count() or 1)
