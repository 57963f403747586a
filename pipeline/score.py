"""Scores raw shards: every stored picture is decoded once, and each signal writes its numbers beside it.

Decoding happens in a torch-free child, a few pictures ahead of the signals. What a signal computes is its module's
affair (`pipeline.signals`); this stage knows rows, batches and files.
"""

from __future__ import annotations

import difflib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import MISSING, HeadraceError, digest
from pipeline.books import Summary, raw_markers
from pipeline.engine import Part, Shard, run_stage
from pipeline.images import ImageSandbox, Limits
from pipeline.shards import DataDir, read_parquet, read_tar, write_parquet
from pipeline.signals import Picture, Signal, SignalOptions, signal_module, signal_names

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

BATCH = 64  # rows; cut within a shard, so that a row's numbers do not depend on who scores which shard
AHEAD = 4  # pictures decoded before their turn
STAGE = "score"
LOST = ("crashed", "timeout")

# Shape is not judged here: what lies in raw/ was let in by the recipe.
LIMITS = Limits(max_aspect=1_000_000.0)


class ScoreConfig(SignalOptions):
    """Which signals, and what they need to know."""

    signals: list[str] = Field(default_factory=signal_names, min_length=1, description="the signals to score")


def run(config: ScoreConfig, data: DataDir, workers: int = 1) -> Summary:
    """Bring the chosen signals of every raw shard up to date; others are left as they are.

    Raises:
        HeadraceError: an unknown signal, no raw shards, a CLIP that cannot be had, or a tar that is not its table's.
    """
    options, settings = _options(config), settings_of(config)
    shards = [
        Shard(marker.shard, marker.rows, (f"raw/{marker.shard}.tar", f"raw/{marker.shard}.parquet"))
        for marker in raw_markers(data)
    ]
    summary = run_stage(data, settings, Score(data, options, settings), shards, workers=workers)
    return replace(summary, stage=STAGE)


def settings_of(config: ScoreConfig) -> dict[str, dict[str, Any]]:
    """What each chosen signal's bytes depend on, by stage; raises as `run` does where a signal or CLIP is not there."""
    names = dict.fromkeys(_known(name) for name in config.signals)
    return {f"{STAGE}/{name}": signal_module(name).settings(_options(config)) for name in names}


def _options(config: ScoreConfig) -> SignalOptions:
    return SignalOptions(clip=config.clip, device=config.device)


def _known(name: str) -> str:
    names = signal_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise HeadraceError(f"there is no signal called {name!r}", hint=hint)
    return name


@dataclass(frozen=True)
class Score:
    """Scores one shard: all its stale signals in one pass over its pictures."""

    data: DataDir
    options: SignalOptions
    settings: Mapping[str, Mapping[str, Any]]

    def __call__(self, shard: Shard) -> dict[str, Part]:
        """Write the stale signals' files."""
        signals = {stage: _loaded(stage, self.options, digest(self.settings[stage])) for stage in shard.stages}
        rows = read_parquet(self.data.raw / f"{shard.name}.parquet").to_pylist()
        columns = {stage: _Columns(signal) for stage, signal in signals.items()}
        decode = any("pixels" in signal.reads for signal in signals.values())
        for position, picture in self._pictures(shard.name, rows, decode):
            for each in columns.values():
                each.add(position, picture)
        return {stage: self._write(stage, shard.name, each, rows) for stage, each in columns.items()}

    def _pictures(self, name: str, rows: Sequence[Mapping[str, Any]], decode: bool) -> Iterator[tuple[int, Picture]]:
        """The fetched rows with their place among all, in order; memory holds a few pictures at a time."""
        stored = self._stored(name, rows)
        if not decode:
            for position, _ in stored:
                yield position, Picture(rows[position], None)
            return
        with ExitStack() as stack:
            sandbox = stack.enter_context(ImageSandbox(LIMITS))
            thread = stack.enter_context(ThreadPoolExecutor(1))
            for position, future in _ahead(stored, lambda body: thread.submit(_decoded, sandbox, body)):
                pixels = future.result()
                if isinstance(pixels, str):
                    yield position, Picture(rows[position], None, pixels)
                else:
                    yield position, Picture(rows[position], pixels)

    def _stored(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, bytes]]:
        """The bytes of every row that has a picture; the tar must hold exactly those, in the rows' order."""
        samples = read_tar(self.data.raw / f"{name}.tar")
        for position, row in enumerate(rows):
            if row["status"] != "success":
                continue
            sample = next(samples, None)
            body = sample.image() if sample and sample.key == row["key"] else None
            if body is None:
                found = f"sample {sample.key}" if sample else "the end"
                raise self._differ(name, f"lists picture {row['key']} where the tar has {found}")
            yield position, body
        extra = next(samples, None)
        if extra:
            raise self._differ(name, f"does not list sample {extra.key} of the tar")

    def _differ(self, name: str, how: str) -> HeadraceError:
        path = self.data.raw / f"{name}.parquet"
        hint = "remove both files and run `curate download` (or `curate ingest`) again"
        return HeadraceError(f"{path} and its tar disagree: the table {how}", hint=hint, code=MISSING)

    def _write(self, stage: str, name: str, columns: _Columns, rows: Sequence[Mapping[str, Any]]) -> Part:
        path = f"signals/{stage.removeprefix(STAGE + '/')}/{name}.parquet"
        write_parquet(columns.table([row["key"] for row in rows]), self.data.root / path)
        fates = columns.fates + Counter(no_picture=len(rows) - columns.fates.total())
        return Part(dict(sorted(fates.items())), (path,))


class _Columns:
    """Collects one signal's values, batch by batch, and the fates of the rows."""

    def __init__(self, signal: Signal) -> None:
        self.fates: Counter[str] = Counter()
        self._signal = signal
        self._rows = 0  # in the batch that is being filled
        self._seen: list[Any] = []
        self._positions: list[int] = []
        self._tables: list[pa.Table] = [signal.schema().empty_table()]

    def add(self, position: int, picture: Picture) -> None:
        """Take the row at this position among all."""
        seen = self._signal.look(picture)
        if seen is not None:
            self._seen.append(seen)
            self._positions.append(position)
        self.fates[self._fate(picture)] += 1
        self._rows += 1
        if self._rows == BATCH:
            self._flush()

    def table(self, keys: list[str]) -> pa.Table:
        """A row for every key, NULL where the signal saw nothing."""
        import pyarrow as pa

        self._flush()
        found = dict(zip(self._positions, range(len(self._positions)), strict=True))
        values = pa.concat_tables(self._tables).combine_chunks()
        values = values.take(pa.array(map(found.get, range(len(keys))), pa.int64()))
        table = values.add_column(0, pa.field("key", pa.string()), pa.array(keys, pa.string()))
        return table.replace_schema_metadata(self._signal.schema().metadata)

    def _flush(self) -> None:
        if self._seen:
            self._tables.append(self._signal.columns(self._seen))
        self._rows, self._seen = 0, []

    def _fate(self, picture: Picture) -> str:
        if picture.error is not None and "pixels" in self._signal.reads:
            return "undecodable"
        return "no_caption" if picture.caption is None and "caption" in self._signal.reads else "scored"


def _ahead(
    stored: Iterator[tuple[int, bytes]], submit: Callable[[bytes], Future[Any]]
) -> Iterator[tuple[int, Future[Any]]]:
    """Each picture's decoding, started `AHEAD` pictures before it is asked for."""
    waiting: deque[tuple[int, Future[Any]]] = deque()
    for position, body in stored:
        waiting.append((position, submit(body)))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _decoded(sandbox: ImageSandbox, body: bytes) -> NDArray[np.uint8] | str:
    """Pixels, or why not. A child that died or hung may have been hit from outside: only a second time counts."""
    pixels = sandbox.decode(body)
    if isinstance(pixels, str) and pixels.startswith(LOST):
        pixels = sandbox.decode(body)
    if isinstance(pixels, str) and pixels.startswith(LOST):
        return pixels.partition(":")[0]  # the rest (seconds, a signal) differs from run to run
    return pixels


@lru_cache(maxsize=8)
def _loaded(stage: str, options: SignalOptions, settings: str) -> Signal:
    """A signal, loaded once per process as long as its settings (by their digest) stay the same."""
    return signal_module(stage.removeprefix(f"{STAGE}/")).load(options)
