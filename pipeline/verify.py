"""Checks a packed set, wherever it lies: every file's checksum, then whether tar, Parquet and manifest agree.

It needs nothing but the folder, decodes no picture and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError, file_sha256
from pipeline.packed.manifest import NAME, read_manifest
from pipeline.shards import (
    FORMAT_VERSION,
    IMAGE_EXTENSIONS,
    Member,
    canonical_json,
    read_parquet,
    split_name,
    tar_members,
    vectors,
)

if TYPE_CHECKING:
    import pyarrow as pa

FACTS = ("uid", "url", "caption", "width", "height")
MAGIC = {"jpg": (b"\xff\xd8\xff",), "png": (b"\x89PNG\r\n\x1a\n",), "webp": (b"RIFF",)}
NORM_ERROR = 0.01  # of a unit vector in float16
COSINE_ERROR = 0.01  # of clip_sim against the rounded vectors


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file (relative to the set), and what."""

    path: str
    problem: str


@dataclass
class Verdict:
    """What a check found, and over how much."""

    folder: Path
    files: int = 0
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)

    def text(self) -> str:
        """For a person: a line per finding, or one that says all is well."""
        if not self.findings:
            return f"{self.folder}: {self.files:,} files and {self.samples:,} samples are as they were packed"
        lines = [f"{finding.path}: {finding.problem}" for finding in self.findings]
        return "\n".join([*lines, f"{self.folder}: {len(lines):,} findings in {self.files:,} files"])


def run(folder: Path) -> Verdict:
    """Check the packed set in `folder`; `findings` is empty when every byte and every row is in its place.

    Raises:
        HeadraceError: code 3 when there is no such folder.
    """
    if not folder.is_dir():
        raise HeadraceError(
            f"there is no folder {folder}", hint="name a packed set, such as data/curated", code=MISSING
        )
    verdict = Verdict(folder)
    try:
        manifest = read_manifest(folder / NAME)
    except FileNotFoundError:
        verdict.findings.append(Finding(NAME, "is missing: packing did not end, or this is no packed set"))
        return verdict
    except ValueError as error:
        verdict.findings.append(Finding(NAME, f"is damaged: {error}; without it nothing else can be checked"))
        return verdict
    if manifest["format_version"] != FORMAT_VERSION:
        verdict.findings.append(Finding(NAME, f"is of format {manifest['format_version']}, not {FORMAT_VERSION}"))
        return verdict
    verdict.findings += _check_files(folder, manifest["files"])
    verdict.files = len(manifest["files"]) + 1
    _check_shards(verdict, manifest)
    return verdict


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Missing, extra and changed files."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    for name in sorted(there - files.keys() - {NAME}):
        yield Finding(name, "does not belong to the set")
    for name, record in sorted(files.items()):
        path = folder / name
        if name not in there or not path.is_file():
            yield Finding(name, "is missing")
        elif (size := path.stat().st_size) != record["bytes"]:
            yield Finding(name, f"has {size:,} bytes instead of {record['bytes']:,}")
        elif file_sha256(path) != record["sha256"]:
            yield Finding(name, "has other content than was packed (its sha256 differs)")


# --- what lies inside ------------------------------------------------------------------------------


def _check_shards(verdict: Verdict, manifest: Mapping[str, Any]) -> None:
    """The shards whose files are sound, one by one, then the counts over all of them."""
    bad = {finding.path for finding in verdict.findings}
    held_out: set[str] = set()
    for split in ("val", "train"):
        names = sorted(name for name in manifest["files"] if name.startswith(f"{split}/") and name.endswith(".tar"))
        rows, last = 0, ""
        for tar in names:
            rows += manifest["files"][tar]["samples"]
            parquet = tar.removesuffix("tar") + "parquet"
            if {tar, parquet} & bad:
                continue
            keys, problems = _check_shard(verdict.folder, tar, parquet, manifest)
            verdict.samples += len(keys)
            if keys and keys[0] <= last:
                problems.append(f"its first key {keys[0]} does not come after {last}, the last of the shard before")
            if split == "train" and (shared := held_out.intersection(keys)):
                problems.append(f"it holds {min(shared)}, which val holds too")
            last = keys[-1] if keys else last
            held_out.update(keys if split == "val" else ())
            verdict.findings += [Finding(tar, problem) for problem in problems]
        stated = manifest["counts"][split]
        if stated != {"samples": rows, "shards": len(names)}:
            problem = f"counts {stated} for {split}, where its files have {rows:,} samples in {len(names):,} shards"
            verdict.findings.append(Finding(NAME, problem))


def _check_shard(folder: Path, tar: str, parquet: str, manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys of a shard, and what is wrong with it."""
    try:
        table = read_parquet(folder / parquet)
        members = tar_members(folder / tar)
    except HeadraceError as error:
        return [], [error.message]
    columns = {field.name: str(field.type) for field in table.schema}
    if columns != manifest["columns"]:
        return [], [f"{parquet} has other columns than the manifest says"]
    problems = []
    if table.num_rows != manifest["files"][tar]["samples"]:
        problems.append(f"{parquet} has {table.num_rows:,} rows, not {manifest['files'][tar]['samples']:,}")
    problems += [
        problem for problem in (_alignment(folder / tar, members, table), *_numbers(table, manifest)) if problem
    ]
    return table["key"].to_pylist(), problems


def _alignment(path: Path, members: list[Member], table: pa.Table) -> str | None:
    """The first sample in which tar and Parquet differ."""
    rows = table.select(["key", *FACTS, "offset", "length"]).to_pylist()
    if len(members) != 3 * len(rows):
        return f"it has {len(members):,} members for {len(rows):,} rows of its Parquet, three each"
    last = ""
    with path.open("rb") as file:
        for row, first in zip(rows, range(0, len(members), 3), strict=True):
            if row["key"] <= last:
                return f"key {row['key']} does not come after {last}"
            last = row["key"]
            trio = members[first : first + 3]
            contents = []
            for member in trio:
                file.seek(member.offset)
                contents.append(file.read(member.length))
            if problem := _sample_problem(row, trio, contents):
                return f"sample {row['key']}: {problem}"
    return None


def _sample_problem(row: Mapping[str, Any], members: list[Member], contents: list[bytes]) -> str | None:
    key = row["key"]
    extension = split_name(members[0].name)[1]
    if extension not in IMAGE_EXTENSIONS or [m.name for m in members] != [
        f"{key}.{e}" for e in (extension, "txt", "json")
    ]:
        return f"the tar has {', '.join(member.name for member in members)} in its place"
    if (row["offset"], row["length"]) != (members[0].offset, members[0].length):
        return "offset and length do not point at its picture"
    if not contents[0].startswith(MAGIC.get(extension, (b"",))):
        return f"its picture is no {extension}"
    if contents[1] != row["caption"].encode("utf-8", "surrogatepass"):
        return "its .txt is not its caption"
    if contents[2] != canonical_json({name: row[name] for name in FACTS}):
        return f"its .json does not say what its row says: {_difference(contents[2], row)}"
    return None


def _difference(data: bytes, row: Mapping[str, Any]) -> str:
    try:
        facts = json.loads(data)
        return ", ".join(name for name in FACTS if facts.get(name) != row[name]) or "it is written in another form"
    except (ValueError, AttributeError, RecursionError):
        return "it is no JSON object"


def _numbers(table: pa.Table, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a shard's vectors, similarity and weights."""
    import numpy as np

    weight = table["weight"].to_numpy()
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        yield "a weight is negative or not a number"
    clip = manifest["clip"]
    if clip is None:
        return
    unit = {}
    for name in ("image_emb", "text_emb"):
        if name not in table.column_names:
            yield f"it has no {name}, although the manifest names a CLIP"
            return
        if (width := table[name].type.list_size) != clip["dimension"]:
            yield f"{name} has {width} values where the CLIP gives {clip['dimension']}"
            return
        valid = np.asarray(table[name].is_valid())
        unit[name] = vectors(table[name]).astype(np.float32)
        norms = np.linalg.norm(unit[name][valid], axis=1)
        if wrong := int((~(np.abs(norms - 1) <= NORM_ERROR)).sum()):
            yield f"{wrong:,} vectors of {name} are not of length 1"
            return
    if "clip_sim" in table.column_names:
        known = np.asarray(table["clip_sim"].is_valid())
        cosine = np.einsum("nd,nd->n", unit["image_emb"], unit["text_emb"])[known]
        stated = table["clip_sim"].filter(known).to_numpy()
        if wrong := int((~(np.abs(cosine - stated) <= COSINE_ERROR)).sum()):
            yield f"clip_sim of {wrong:,} samples is not the cosine of their vectors"
