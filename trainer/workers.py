"""Reading beside training: batches ahead in a thread, pictures in processes.

Threads could make pictures too, but the interpreter's lock, which each needs for a moment, would hold up the one that
gives a GPU its work. This module knows nothing of what is read.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from math import prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline.base import FINDINGS, HeadraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Make = Callable[[int], torch.Tensor]

T = TypeVar("T")
CHUNK = 32  # rows that a process makes at a time, at most


def read_ahead(read: Callable[[int], T], steps: Iterable[int], most: int) -> Iterator[T]:
    """What `read` gives for each step, in order, with `most` more read in another thread; its errors come in turn."""
    with ThreadPoolExecutor(1) as pool:
        reading: deque[Future[T]] = deque()
        for step in steps:
            reading.append(pool.submit(read, step))
            if len(reading) > most:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


class Workers:
    """Processes, of one thread each, that make uint8 rows of one shape, at most `room` of them at once.

    They are forked at the first call, so `make` is there without being sent, and end when this is let go.
    """

    def __init__(self, make: Make, shape: tuple[int, ...], room: int) -> None:
        self.room = room
        # Shared by being there before the fork: of /dev/shm a container has 64 MB.
        memory = np.frombuffer(mmap.mmap(-1, room * prod(shape)), np.uint8).reshape(room, *shape)
        self._memory = torch.from_numpy(memory)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self._count = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin, initargs=(make, self._memory))

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """What `make` gives for each of these, in order; its first error is raised.

        Raises:
            HeadraceError: a process was killed from outside.
        """
        count = max(self._count, -(-len(rows) // CHUNK))
        places = np.array_split(np.arange(len(rows)), min(count, max(1, len(rows))))
        try:
            filling = [self._pool.submit(_fill, part.tolist(), rows[part].tolist()) for part in places]
            wait(filling)  # all of them, so that none still writes after another's error
            for done in filling:
                done.result()
        except BrokenProcessPool:
            hint = "see whether memory ran out, then go on with --resume"
            raise HeadraceError("a process that reads the set was killed from outside", hint, FINDINGS) from None
        return self._memory[: len(rows)].clone()


_make: Make
_memory: torch.Tensor


def _begin(make: Make, memory: torch.Tensor) -> None:
    """In a new process, which ends with its parent, and leaves to it the signals that all of a group get."""
    global _make, _memory
    _make, _memory = make, memory
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _fill(places: list[int], rows: list[int]) -> None:
    for place, row in zip(places, rows, strict=True):
        _memory[place] = _make(row)
