"""Tars and tables: equal bytes for equal content, and others' tars read right."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.base import HeadraceError
from pipeline.shards import (
    TarWriter,
    read_parquet,
    read_tar,
    source_name,
    split_name,
    tar_members,
    vector_column,
    vectors,
    write_parquet,
)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with path.open("wb") as file:
        tar = TarWriter(file)
        for name, data in members.items():
            tar.add(name, data)
        tar.close()


def test_tarfile_reads_what_we_write_and_offsets_point_at_the_bytes(tmp_path: Path) -> None:
    members = {"0001.jpg": b"x" * 700, "0001.txt": b"", "0001.json": b"{}"}
    path = tmp_path / "a.tar"
    write_tar(path, members)
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
        assert {i.name: tar.extractfile(i).read() for i in infos} == members  # type: ignore[union-attr]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.mode) for i in infos} == {(0, 0, 0, "", 0o444)}
        assert [i.offset_data for i in infos] == [m.offset for m in tar_members(path)]
    assert [(s.key, list(s.files)) for s in read_tar(path)] == [("0001", ["jpg", "txt", "json"])]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_match_tarfile_on_every_dialect(tmp_path: Path, form: int) -> None:
    path = tmp_path / "b.tar"
    names = ["a/b/c.jpg", "d.txt", "long/" * 30 + "e.jpg"[-80:]]
    names += [] if form == tarfile.USTAR_FORMAT else ["x" * 300 + ".jpg", "ü" * 80 + ".jpg"]
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = i * 700
            tar.addfile(info, io.BytesIO(bytes(i * 700)))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(i.name, i.offset_data, i.size) for i in tar.getmembers() if i.isreg()]
    assert [tuple(member) for member in tar_members(path)] == expected


@pytest.mark.parametrize("cut", [100, 512, 900, 1600])
def test_a_cut_or_garbled_tar_is_damaged(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.tar"
    write_tar(path, {"1.jpg": b"y" * 1000})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(HeadraceError, match="is damaged"):
        tar_members(path)
    path.write_bytes(b"\xff" * 2048)
    with pytest.raises(HeadraceError, match="no tar header at byte 0"):
        tar_members(path)


def test_keys_split_at_the_first_dot_of_the_base_name() -> None:
    assert split_name("a.b/c.seg.PNG") == ("a.b/c", "seg.png")
    assert split_name("plain") == ("plain", "")


def test_vectors_round_trip_with_nulls(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float16)
    valid = np.array([True, False, True, True, False])
    write_parquet(pa.table({"v": vector_column(values, valid)}), tmp_path / "v.parquet")
    column = read_parquet(tmp_path / "v.parquet")["v"]
    assert column.null_count == 2
    np.testing.assert_array_equal(vectors(column), np.where(valid[:, None], values, 0))
    np.testing.assert_array_equal(vectors(column.slice(1, 3)), np.where(valid[:, None], values, 0)[1:4])


def test_damaged_parquet_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(HeadraceError, match="is damaged"):
        read_parquet(tmp_path / "p.parquet")


def test_source_name_is_free() -> None:
    assert source_name("a", {"b"}) == "a"
    assert source_name("a", {"a", "source_a"}) == "source_source_a"
