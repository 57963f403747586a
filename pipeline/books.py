"""The books of every stage: a marker for each finished shard, and what they sum up to.

A marker holds a shard's counts, its settings, its inputs' hashes and its outputs' sizes and hashes. It is written last,
and only when every row has one fate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base import FINDINGS, MISSING, REFUSED, HeadraceError, digest, read_json, write_json
from pipeline.shards import DataDir


@dataclass(frozen=True)
class Marker:
    """The record that a shard of a stage is done."""

    stage: str
    shard: str
    rows: int
    fates: Mapping[str, int]
    inputs: Mapping[str, str]
    outputs: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    seconds: float


@dataclass
class Summary:
    """The books of a stage after a run: over all its shards, those found done included."""

    stage: str
    shards: int = 0
    done: int = 0
    rows: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def sentence(self) -> str:
        """One line for a person."""
        if not self.done:
            return f"{self.stage}: nothing to do, {self.shards} of {self.shards} shards hold ({self.rows:,} rows)"
        kept = ", ".join(f"{count:,} {fate}" for fate, count in self.fates.most_common(4))
        return f"{self.stage}: {self.done} of {self.shards} shards in {self.seconds:.1f} s, {self.rows:,} rows: {kept}"


def read_markers(data: DataDir, stage: str) -> dict[str, Marker]:
    """The markers of a stage by shard name, in order."""
    found = [Marker(**read_json(path)) for path in sorted((data.markers / stage).glob("*.json"))]
    return {marker.shard: marker for marker in found}


def raw_markers(data: DataDir) -> list[Marker]:
    """The markers of all raw shards, downloaded or ingested, by shard name; none at all is a `HeadraceError`."""
    found = read_markers(data, "ingest") | read_markers(data, "download")
    if not found:
        hint = "run `curate download URLS` or `curate ingest SOURCE` first, or name the right --data"
        raise HeadraceError(f"{data.root} holds no raw shards", hint=hint, code=MISSING)
    return [found[name] for name in sorted(found)]


def recorded_outputs(data: DataDir) -> dict[str, Mapping[str, Any]]:
    """Every file that some marker answers for: relative path to its size and sha256."""
    outputs: dict[str, Mapping[str, Any]] = {}
    for path in sorted(data.markers.glob("**/*.json")):
        outputs |= read_json(path)["outputs"]
    return outputs


def books(data: DataDir, stage: str) -> Summary:
    """The books of a stage as its markers have them, without any work."""
    return summarize(stage, read_markers(data, stage).values(), 0, 0.0)


def summarize(stage: str, markers: Any, done: int, seconds: float) -> Summary:
    summary = Summary(stage, len(markers), done, seconds=seconds)
    for marker in markers:
        summary.rows += marker.rows
        summary.fates.update(marker.fates)
    return summary


def write_marker(data: DataDir, marker: Marker) -> Marker:
    total = sum(marker.fates.values())
    if total != marker.rows:
        raise HeadraceError(
            f"{marker.stage} of shard {marker.shard} took in {marker.rows:,} rows but accounts for {total:,}",
            hint="this is a fault of Headrace: please report it; nothing was marked as done",
            code=FINDINGS,
        )
    write_json(data.markers / marker.stage / f"{marker.shard}.json", marker.__dict__)
    return marker


def prune(data: DataDir, markers: dict[str, Marker], names: set[str]) -> None:
    """Remove what shards that no longer exist have left: first the marker, then the files."""
    current = {path for name in names & markers.keys() for path in markers[name].outputs}
    for name in sorted(markers.keys() - names):
        marker = markers.pop(name)
        (data.markers / marker.stage / f"{name}.json").unlink(missing_ok=True)
        for path in marker.outputs.keys() - current:
            (data.root / path).unlink(missing_ok=True)


def refuse_other(data: DataDir, settings: Mapping[str, Any], markers: Any) -> None:
    for marker in markers:
        if digest(marker.settings) != digest(settings):
            names = [k for k in {*marker.settings, *settings} if marker.settings.get(k) != settings.get(k)]
            raise HeadraceError(
                f"{data.root} was made from another list or with other settings "
                f"({', '.join(sorted(names))} of `{marker.stage}`)",
                hint="use another --data folder, or --redo to replace what is there",
                code=REFUSED,
            )


def stale_files(data: DataDir, marker: Marker, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a marker does not hold any more, whatever its settings: its inputs and outputs that differ, a phrase each."""
    changed = {path for path, sha256 in marker.inputs.items() if recorded.get(path, {}).get("sha256") != sha256}
    sizes = {path: size_of(data.root / path) for path in marker.outputs}
    return [f"{path} was made anew" if path in recorded else f"{path} has gone" for path in sorted(changed)] + [
        f"{path} is missing" if sizes[path] is None else f"{path} has another size than recorded"
        for path, output in sorted(marker.outputs.items())
        if sizes[path] != output["bytes"]
    ]


def size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
