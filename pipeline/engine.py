"""Stages over shards: what is stale, and who works on it.

One call, `run_stage`, takes a function of one shard and the shards there are. It skips those whose marker still holds,
spreads the rest over local processes, checks that every row has one fate, and writes each marker last. The only seam a
second backend needs is `_map`. It knows nothing of what a stage does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.base import (
    FINDINGS,
    MISSING,
    REFUSED,
    HeadraceError,
    digest,
    disk_error,
    file_sha256,
    hush_libraries,
)
from pipeline.books import (
    Marker,
    Summary,
    prune,
    read_markers,
    recorded_outputs,
    refuse_other,
    size_of,
    summarize,
    write_marker,
)
from pipeline.shards import DataDir, made_by

FOLDERS = ("urls", "raw", "signals", "decisions", "curated", "report", "miniweb", ".markers", ".retry")


@dataclass(frozen=True)
class Shard:
    """A unit of work: `rows` come in (None: the work itself counts them), `inputs` are the files read, relative paths.

    `stages` is filled in by the engine with those stages whose marker for this shard does not hold any more.
    """

    name: str
    rows: int | None
    inputs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """What a stage made of a shard: how many rows met which fate, and the files written (relative paths)."""

    fates: Mapping[str, int]
    outputs: tuple[str, ...]


Process = Callable[[Shard], Mapping[str, Part]]


def run_stage(
    data: DataDir,
    stages: Mapping[str, Mapping[str, Any]],
    process: Process,
    shards: Sequence[Shard],
    *,
    workers: int = 1,
    refuse_change: bool = False,
    hash_inputs: bool = True,
) -> Summary:
    """Bring every shard of the given stages up to date and return the books of the first one.

    `stages` maps a stage's name to the settings that its outputs depend on. `process` is picklable, gets a shard whose
    `stages` are the stale ones, writes their outputs atomically and returns a `Part` for each. With `refuse_change`, a
    marker of other settings is an error (exit code 4) instead of work. `hash_inputs=False` trusts the inputs' sizes.
    """
    started = time.monotonic()
    recorded = recorded_outputs(data)
    markers = {stage: read_markers(data, stage) for stage in stages}
    if refuse_change:
        for stage, settings in stages.items():
            refuse_other(data, settings, markers[stage].values())
    checked = [_stale(data, stages, markers, shard, recorded) for shard in shards]
    stale = [shard for shard in checked if shard.stages]
    task = _Task(data, process, hash_inputs)
    name = next(iter(stages))
    work = [(shard, {path: recorded[path] for path in shard.inputs}) for shard in stale]
    for shard, parts, seconds in _progress(name.partition("/")[0], _map(task, work, workers), stale):
        for stage, (part, outputs) in parts.items():
            inputs = {path: recorded[path]["sha256"] for path in shard.inputs}
            rows = sum(part.fates.values()) if shard.rows is None else shard.rows
            marker = Marker(stage, shard.name, rows, part.fates, inputs, outputs, stages[stage], seconds)
            markers[stage][shard.name] = write_marker(data, marker)
    for stage in stages:
        prune(data, markers[stage], {shard.name for shard in shards})
    return summarize(name, markers[name].values(), len(stale), time.monotonic() - started)


# --- what is stale --------------------------------------------------------------------------------


def _stale(
    data: DataDir,
    stages: Mapping[str, Mapping[str, Any]],
    markers: Mapping[str, Mapping[str, Marker]],
    shard: Shard,
    recorded: Mapping[str, Mapping[str, Any]],
) -> Shard:
    missing = next((path for path in shard.inputs if path not in recorded), None)
    if missing:
        raise HeadraceError(f"{data.root / missing} has no marker", hint="run the stage that writes it", code=MISSING)
    now = {path: recorded[path]["sha256"] for path in shard.inputs}
    stale = (s for s, settings in stages.items() if not _holds(data, markers[s].get(shard.name), shard, settings, now))
    return replace(shard, stages=tuple(stale))


def _holds(
    data: DataDir, marker: Marker | None, shard: Shard, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    return (
        marker is not None
        and shard.rows in (None, marker.rows)
        and marker.inputs == inputs
        and digest(marker.settings) == digest(settings)
        and all(size_of(data.root / path) == output["bytes"] for path, output in marker.outputs.items())
    )


# --- work -----------------------------------------------------------------------------------------

Work = tuple[Shard, Mapping[str, Mapping[str, Any]]]  # a shard and what is recorded of its inputs
Done = tuple[Shard, dict[str, tuple[Part, dict[str, dict[str, Any]]]], float]


@dataclass(frozen=True)
class _Task:
    """What a worker does with a shard: check the inputs, process, hash the outputs."""

    data: DataDir
    process: Process
    hash_inputs: bool

    def __call__(self, work: Work) -> Done:
        started = time.monotonic()
        shard, recorded = work
        for path in shard.inputs:
            self._check_input(path, recorded[path])
        try:
            parts = self.process(shard)
        except OSError as error:
            raise disk_error(error, self.data.root) from error
        hashed = {stage: (part, {p: self._record(p) for p in part.outputs}) for stage, part in parts.items()}
        assert hashed.keys() == set(shard.stages), (hashed.keys(), shard.stages)
        return shard, hashed, round(time.monotonic() - started, 3)

    def _check_input(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.data.root / name
        size = size_of(path)
        if size is None:
            problem = "is missing"
        elif size != record["bytes"]:
            problem = f"has {size:,} bytes where its marker says {record['bytes']:,}"
        elif self.hash_inputs and file_sha256(path) != record["sha256"]:
            problem = "is not the file that its marker describes (its sha256 differs)"
        else:
            return
        hint = made_by(path) if size != record["bytes"] else f"remove that file, then {made_by(path)}"
        raise HeadraceError(f"{path} {problem}", hint=hint, code=MISSING)

    def _record(self, name: str) -> dict[str, Any]:
        path = self.data.root / name
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _map(task: _Task, work: Sequence[Work], workers: int) -> Iterator[Done]:
    """Run `task` over shards and yield as they finish: here in this process, or on local processes."""
    if workers == 1 or len(work) <= 1:
        yield from map(task, work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(work)), context, initializer=_start_worker) as pool:
        try:
            yield from _as_completed({pool.submit(task, item): item[0] for item in work})
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _as_completed(futures: dict[Future[Done], Shard]) -> Iterator[Done]:
    """Results as they come; after a failure those still running are let finish, so that their work is marked."""
    pending, failure = set(futures), None  # type: set[Future[Done]], BaseException | None
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            try:
                yield future.result()
            except BrokenProcessPool:
                raise HeadraceError(
                    f"a worker died on shard {futures[future].name}, killed from outside or out of memory",
                    hint="run again with fewer --workers: finished shards are kept",
                    code=FINDINGS,
                ) from None
            except Exception as error:
                failure = failure or error
                pending = {other for other in pending if not other.cancel()}
    if failure:
        raise failure


def _start_worker() -> None:
    """A worker dies with its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    hush_libraries()


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone; elsewhere nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _progress(stage: str, results: Iterator[Done], shards: Sequence[Shard]) -> Iterator[Done]:
    """Pass results on, with a bar on a terminal and a plain line per some tenth of the work elsewhere."""
    total = sum(shard.rows or 0 for shard in shards)
    if not sys.stderr.isatty():
        yield from _plain_progress(stage, results, len(shards))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task, started = bar.add_task(stage, total=total, rate=""), time.monotonic()
        for done in results:
            bar.advance(task, done[0].rows or 0)
            rate = bar.tasks[0].completed / max(time.monotonic() - started, 1e-9)
            bar.update(task, rate=f"{rate:,.0f} rows/s")
            yield done


def _plain_progress(stage: str, results: Iterator[Done], shards: int) -> Iterator[Done]:
    started, rows, step = time.monotonic(), 0, max(shards // 10, 1)
    for count, done in enumerate(results, start=1):
        rows += done[0].rows or 0
        if shards > 1 and (count % step == 0 or count == shards):
            rate = rows / max(time.monotonic() - started, 1e-9)
            left = (time.monotonic() - started) / count * (shards - count)
            print(f"{stage}: shard {count} of {shards}, {rate:,.0f} rows/s, {left:.0f} s left", file=sys.stderr)
        yield done


# --- one run per folder ---------------------------------------------------------------------------


@contextlib.contextmanager
def one_run(data: DataDir) -> Iterator[None]:
    """Hold the folder for one run; a second one is refused. Leftovers of a killed run are swept away first."""
    data.root.mkdir(parents=True, exist_ok=True)
    with (data.root / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            message = f"another run (process {owner}) is working in {data.root}"
            raise HeadraceError(message, hint="wait for it, or use another --data folder", code=REFUSED) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _sweep(data.root)
        yield


def _sweep(root: Path) -> None:
    """Remove what a killed run left half-written, and nothing of another run in a folder below this one."""
    inside = (path for name in FOLDERS for path in (root / name).rglob(".*.tmp"))
    for path in [*root.glob(".spool.*.tmp"), *root.glob(".recipe.toml.*.tmp"), *inside]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
