"""`curate status`: how far every stage of a data folder is, from the markers alone.

What is stale is the engine's own comparison of a marker with the files it names. A change of settings shows only when a
stage runs, since only the stage knows which of its settings count. Nothing is written and no picture is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.base import MISSING, HeadraceError
from pipeline.books import Marker, read_markers, recorded_outputs, stale_files
from pipeline.shards import DataDir

ORDER = ("list", "retry", "download", "ingest", "score", "filter", "pairs", "dedup", "split", "pack", "report")
PROBLEMS = 5  # how many are named per stage


@dataclass(frozen=True)
class StageStatus:
    """One stage: `done` + `stale` + `missing` are all shards it should have.

    `rate` is rows per second of one worker, None where no time was recorded; `bytes` are those of the outputs; `fates`
    counts the rows by what became of them; `problems` names the first few things that make shards stale or missing.
    """

    stage: str
    done: int
    stale: int
    missing: int
    rows: int
    bytes: int
    rate: float | None
    fates: Mapping[str, int]
    problems: Sequence[str]


def status(data: DataDir) -> list[StageStatus]:
    """The stages that have run in this folder, in the order of the way through.

    Raises:
        HeadraceError: code 3 where the folder holds no run.
    """
    names = {str(path.parent.relative_to(data.markers)) for path in data.markers.glob("**/*.json")}
    if not names:
        hint = "run `curate download URLS` or `curate ingest SOURCE` first, or name the right --data"
        raise HeadraceError(f"{data.root} holds no run", hint=hint, code=MISSING)
    recorded = recorded_outputs(data)
    markers = {name: read_markers(data, name) for name in sorted(names, key=place)}
    return [_stage(data, name, found, _expected(name, markers), recorded) for name, found in markers.items()]


def as_json(stages: Sequence[StageStatus]) -> list[dict[str, Any]]:
    """The same as JSON-able values."""
    return [asdict(stage) for stage in stages]


def text(stages: Sequence[StageStatus]) -> str:
    """A table for a person, numbers aligned, with the reasons below it."""
    head = ("stage", "done", "stale", "missing", "rows", "rows/s", "size")
    lines = [head, *(_cells(stage) for stage in stages)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "  ".join(_pad(cell, width, i) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]
    shown += [f"{stage.stage}: {problem}" for stage in stages for problem in stage.problems]
    return "\n".join(shown)


def place(stage: str) -> tuple[int, str]:
    """Sorts the names of stages in the order of the way through; unknown ones come last."""
    first = stage.partition("/")[0]
    return (ORDER.index(first) if first in ORDER else len(ORDER)), stage


def _expected(stage: str, markers: Mapping[str, Mapping[str, Marker]]) -> set[str]:
    """The shards a stage should have, as far as the markers of those before it tell."""
    if stage in ("download", "ingest"):
        lists = [marker for name in ("list", "retry") for marker in markers.get(name, {}).values()]
        return {PurePosixPath(path).stem for marker in lists for path in marker.outputs}
    if stage.startswith("score/"):
        return {shard for name in ("download", "ingest") for shard in markers.get(name, {})}
    return set(markers[stage])


def _stage(
    data: DataDir,
    stage: str,
    markers: Mapping[str, Marker],
    expected: set[str],
    recorded: Mapping[str, Mapping[str, Any]],
) -> StageStatus:
    stale = {name: reasons for name, marker in markers.items() if (reasons := _reasons(data, marker, recorded))}
    missing = sorted(expected - markers.keys())
    problems = [f"shard {name}: {reasons[0]}" for name, reasons in stale.items()]
    problems += [f"shard {name} is not made yet" for name in missing]
    if len(problems) > PROBLEMS:
        problems = [*problems[:PROBLEMS], f"and {len(problems) - PROBLEMS:,} more"]
    rows, seconds = sum(m.rows for m in markers.values()), sum(m.seconds for m in markers.values())
    fates: Counter[str] = sum((Counter(marker.fates) for marker in markers.values()), Counter())
    return StageStatus(
        stage=stage,
        done=len(markers) - len(stale),
        stale=len(stale),
        missing=len(missing),
        rows=rows,
        bytes=sum(output["bytes"] for marker in markers.values() for output in marker.outputs.values()),
        rate=round(rows / seconds, 1) if seconds else None,
        fates=dict(sorted(fates.items())),
        problems=problems,
    )


def _reasons(data: DataDir, marker: Marker, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a shard is stale: the engine's comparison and, for a stage over all shards, inputs that came after it."""
    reasons = stale_files(data, marker, recorded)
    if marker.shard == "all":
        kinds = {_kind(path) for path in marker.inputs} - {None}
        reasons += [f"{path} came after it" for path in sorted(recorded.keys() - marker.inputs) if _kind(path) in kinds]
    return reasons


def _kind(path: str) -> tuple[str, str] | None:
    """The folder and extension that a shard's file has in common with those of other shards; None for other files."""
    place = PurePosixPath(path)
    return (str(place.parent), place.suffix) if place.stem.isdigit() else None


def _cells(stage: StageStatus) -> tuple[str, ...]:
    counts = [f"{count:,}" if count else "-" for count in (stage.done, stage.stale, stage.missing)]
    rate = f"{stage.rate:,.0f}" if stage.rate is not None else "-"
    return stage.stage, *counts, f"{stage.rows:,}", rate, human_bytes(stage.bytes)


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def human_bytes(count: float) -> str:
    """A number of bytes for a person: `812 B`, `4.2 MB` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
