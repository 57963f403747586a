"""`verify`: no false alarm, and no single damaged bit, file or row passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.base import HeadraceError, file_sha256
from pipeline.packed.manifest import NAME, manifest_bytes, read_manifest
from pipeline.shards import TarWriter, read_parquet, read_tar, vector_column, vectors, write_parquet
from pipeline.verify import run
from tests.pipeline.packing import packed, rows


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("packed"), rows(36), shard_size=16).curated


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "elsewhere"))


def named(folder: Path) -> list[str]:
    return [finding.path for finding in run(folder).findings]


def test_a_sound_set_has_no_findings_wherever_it_lies(copy: Path) -> None:
    verdict = run(copy)
    assert verdict.findings == [] and verdict.samples == 36
    assert "36 samples are as they were packed" in verdict.text()


def test_any_flipped_bit_is_found_and_its_file_named(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        ends = [0, len(whole) * 8 - 1]
        for bit in [*ends, *(int(b) for b in rng.integers(0, len(whole) * 8, 20))]:
            body = bytearray(whole)
            body[bit // 8] ^= 1 << bit % 8
            path.write_bytes(body)
            assert named(copy) == [path.relative_to(copy).as_posix()], (path, bit)
        path.write_bytes(whole)
    assert run(copy).findings == []


def test_bits_of_the_manifest_count(copy: Path) -> None:
    whole = (copy / NAME).read_bytes()
    for bit in range(0, len(whole) * 8, 31):
        body = bytearray(whole)
        body[bit // 8] ^= 1 << bit % 8
        (copy / "broken.json").write_bytes(body)
        with pytest.raises(ValueError, match="it "):
            read_manifest(copy / "broken.json")


def test_truncated_swapped_missing_and_extra_files_are_named(copy: Path) -> None:
    first, second = copy / "train" / "00000.tar", copy / "train" / "00001.tar"
    whole = first.read_bytes()
    first.write_bytes(whole[:-512])
    assert named(copy) == ["train/00000.tar"]
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)
    assert named(copy) == ["train/00000.tar", "train/00001.tar"]
    second.write_bytes(first.read_bytes())
    first.write_bytes(whole)
    (copy / "val" / "00000.parquet").rename(copy / "val" / "00007.parquet")
    assert named(copy) == ["val/00007.parquet", "val/00000.parquet"]
    assert "2 findings" in run(copy).text()


def test_no_manifest_and_no_folder(copy: Path, tmp_path: Path) -> None:
    (copy / NAME).unlink()
    assert [(f.path, "did not end" in f.problem) for f in run(copy).findings] == [(NAME, True)]
    with pytest.raises(HeadraceError, match="no folder") as error:
        run(tmp_path / "nowhere")
    assert error.value.code == 3


# --- wrong sets with right checksums ---------------------------------------------------------------


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make the manifest agree with the files as they now are, so that only their content can give them away."""
    manifest = read_manifest(folder / NAME)
    for name, record in manifest["files"].items():
        record |= {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    change(manifest)
    (folder / NAME).write_bytes(manifest_bytes(manifest))


def retar(path: Path, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    members = [(f"{s.key}.{extension}", body) for s in read_tar(path) for extension, body in s.files.items()]
    change(members)
    with path.open("wb") as file:
        tar = TarWriter(file)
        for name, body in members:
            tar.add(name, body)
        tar.close()


def swap(i: int, j: int) -> Callable[[list[tuple[str, bytes]]], None]:
    def change(members: list[tuple[str, bytes]]) -> None:
        (a, x), (b, y) = members[i], members[j]
        members[i], members[j] = (a, y), (b, x)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swap(1, 4), "its .txt is not its caption"),
        (swap(2, 5), "its .json does not say"),
        (lambda members: members.__setitem__(slice(0, 2), members[1::-1]), "the tar has"),
        (lambda members: members.pop(), "members for"),
        (lambda members: members.__setitem__(0, (members[0][0], b"GIF" + members[0][1][3:])), "its picture is no jpg"),
    ],
)
def test_a_tar_that_tells_another_story(copy: Path, change: Any, problem: str) -> None:
    retar(copy / "train" / "00001.tar", change)
    seal(copy)
    found = run(copy).findings
    assert [finding.path for finding in found] == ["train/00001.tar"] and problem in found[0].problem


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        return table.set_column(index, table.schema.field(name), make(table[name]))

    return change


def vector(row: int, value: float) -> Callable[[Any], Any]:
    def make(column: Any) -> Any:
        values = vectors(column)
        values[row, 0] = value
        return vector_column(values, np.ones(len(values)))

    return make


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (replaced("offset", lambda c: pa.array([v + 1 for v in c.to_pylist()])), "offset and length"),
        (replaced("image_emb", vector(3, float("nan"))), "1 vectors of image_emb are not of length 1"),
        (replaced("text_emb", vector(3, 2.0)), "1 vectors of text_emb are not of length 1"),
        (replaced("clip_sim", lambda c: c.combine_chunks()[::-1]), "is not the cosine"),
        (replaced("weight", lambda c: pa.array([-1.0] * len(c), pa.float32())), "a weight is negative"),
        (lambda table: table.slice(1), "rows, not"),
        (lambda table: table.drop_columns(["phash"]), "other columns"),
        (lambda table: table.take([1, 0, *range(2, table.num_rows)]), "the tar has"),
    ],
)
def test_a_parquet_that_tells_another_story(copy: Path, change: Any, problem: str) -> None:
    path = copy / "train" / "00000.parquet"
    write_parquet(change(read_parquet(path)), path)
    seal(copy)
    found = run(copy).findings
    assert {finding.path for finding in found} == {"train/00000.tar"}
    assert any(problem in finding.problem for finding in found), found


def test_a_manifest_that_tells_another_story(copy: Path) -> None:
    seal(copy, lambda manifest: manifest["counts"]["val"].update(samples=99))
    assert named(copy) == [NAME]
    seal(copy, lambda manifest: manifest["counts"]["val"].update(samples=3))
    seal(copy, lambda manifest: manifest["clip"].update(dimension=512))
    assert any("8 values where the CLIP gives 512" in finding.problem for finding in run(copy).findings)
    seal(copy, lambda manifest: manifest.update(format_version=99))
    assert "format 99" in run(copy).findings[0].problem


def test_a_sample_in_both_splits_is_found(copy: Path) -> None:
    for extension in ("tar", "parquet"):
        shutil.copy(copy / "train" / f"00000.{extension}", copy / "val" / f"00000.{extension}")

    def agree(manifest: dict[str, Any]) -> None:
        for extension in ("tar", "parquet"):
            manifest["files"][f"val/00000.{extension}"]["samples"] = 16
        manifest["counts"]["val"]["samples"] = 16

    seal(copy, agree)
    assert any("which val holds too" in finding.problem for finding in run(copy).findings)
