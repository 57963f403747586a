"""`pack`: what is in a sample, what is held out, and that equal input gives equal bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import verify
from pipeline.base import HeadraceError, file_sha256
from pipeline.pack import PackConfig, run
from pipeline.packed import split
from pipeline.packed.manifest import NAME, read_manifest
from pipeline.shards import DataDir, TarWriter, read_parquet, read_tar, vectors
from tests.pipeline.factory import Row, jpeg, make_raw, picture
from tests.pipeline.packing import IDENTITY, RECIPE, decide, dedup, packed, raw_table, rows, score, tree


def samples(data: DataDir, which: str) -> list[dict[str, object]]:
    """All rows of a split's Parquet files, in order."""
    files = sorted((data.curated / which).glob("*.parquet"))
    return [row for path in files for row in read_parquet(path).to_pylist()]


# --- what a sample holds ---------------------------------------------------------------------------


def test_a_packed_sample_has_the_stored_bytes_and_all_numbers(tmp_path: Path) -> None:
    listed = [
        *rows(40, page="p"),
        Row(None, "dead", extra={"page": "q"}),
        Row(picture(99, 48), None, extra={"page": "r"}),
    ]
    data = packed(tmp_path, listed)
    raw = {row["key"]: row for row in raw_table(data).to_pylist()}
    stored = {s.key: s.image() for path in sorted(data.raw.glob("*.tar")) for s in read_tar(path)}
    seen = 0
    for tar in sorted(data.curated.glob("*/*.tar")):
        table = read_parquet(tar.with_suffix(".parquet"))
        body = tar.read_bytes()
        for sample, row in zip(read_tar(tar), table.to_pylist(), strict=True):
            assert sample.key == row["key"] and list(sample.files) == ["jpg", "txt", "json"]
            assert sample.image() == stored[sample.key] == body[row["offset"] : row["offset"] + row["length"]]
            facts = {name: raw[sample.key][name] for name in ("uid", "url", "caption", "width", "height")}
            facts["caption"] = facts["caption"] or ""
            assert json.loads(sample.files["json"]) == facts == {name: row[name] for name in facts}
            assert sample.files["txt"].decode() == facts["caption"]
            assert row["phash"] == int(sample.key) and row["page"] in ("p", "r") and row["weight"] == 1.0
            seen += 1
        assert np.allclose(np.linalg.norm(vectors(table["image_emb"]).astype(float), axis=1), 1, atol=1e-3)
    assert seen == 41
    manifest = read_manifest(data.curated / NAME)
    assert manifest["clip"] == IDENTITY and manifest["device"] == "cpu" and manifest["recipe"] == RECIPE
    assert manifest["counts"]["train"]["samples"] + manifest["counts"]["val"]["samples"] == 41
    assert {(c["stage"], c["reason"], c["rows"]) for c in manifest["funnel"]} == {
        ("fetch", "http_404", 1),
        ("kept", "", 41),
    }


def test_survivors_keep_their_order_and_fill_shards(tmp_path: Path) -> None:
    data = packed(tmp_path, rows(50), shard_size=20)
    keys = [row["key"] for row in samples(data, "train")]
    assert keys == sorted(keys)
    assert [read_parquet(p).num_rows for p in sorted((data.curated / "train").glob("*.parquet"))] == [20, 20, 5]
    assert set(keys) | {row["key"] for row in samples(data, "val")} == set(raw_table(data)["key"].to_pylist())


def test_it_works_without_the_clip_signal(tmp_path: Path) -> None:
    data = packed(tmp_path, rows(20), clip=False)
    assert "image_emb" not in samples(data, "train")[0]
    assert read_manifest(data.curated / NAME)["clip"] is None
    assert verify.run(data.curated).findings == []


def test_colliding_and_null_columns_keep_their_types(tmp_path: Path) -> None:
    listed = [
        Row(picture(i, 48), f"c {i}", extra={"WIDTH": i, "key": "mine", "weight": w, "note": None if i < 8 else "late"})
        for i, w in enumerate([2.5, None, -1.0, float("nan"), *[1.0] * 12])
    ]
    data = packed(tmp_path, listed, shard_size=4, raw_size=8)
    tables = [read_parquet(path) for path in sorted(data.curated.glob("*/*.parquet"))]
    assert all(table.schema.equals(tables[0].schema) for table in tables)
    assert str(tables[0].schema.field("note").type) == "string"
    by_url = {row["url"]: row for row in (r for table in tables for r in table.to_pylist())}
    weights = [by_url[f"http://host{i % 5}.test/{i}.jpg"]["weight"] for i in range(4)]
    assert weights == [2.5, 1.0, 1.0, 1.0]
    assert {row["source_key"] for row in by_url.values()} == {"mine"}
    assert by_url["http://host3.test/3.jpg"]["source_WIDTH"] == 3 and by_url["http://host3.test/3.jpg"]["width"] == 48


# --- the same bytes --------------------------------------------------------------------------------


def test_one_and_two_workers_and_a_second_run_give_the_same_bytes(tmp_path: Path) -> None:
    one = packed(tmp_path / "one", rows(50))
    two = make_raw(tmp_path / "two", rows(50), 16)
    score(two)
    decide(two)
    run(PackConfig(shard_size=20), two, 2, RECIPE)
    assert tree(one.curated) == tree(two.curated)
    times = {path: path.stat().st_mtime_ns for path in one.curated.rglob("*")}
    assert run(PackConfig(shard_size=20), one, 1, RECIPE).done == 0
    assert times == {path: path.stat().st_mtime_ns for path in one.curated.rglob("*")}


def test_a_smaller_set_leaves_nothing_of_the_larger_one(tmp_path: Path) -> None:
    data = packed(tmp_path / "a", rows(60), shard_size=10)
    stray = data.curated / "train" / "00099.tar"
    stray.write_bytes(b"of a run whose markers are gone")
    dropped = dict.fromkeys(range(10, 60), "filter:min_clip")
    decide(data, dropped)
    run(PackConfig(shard_size=10), data, 1, RECIPE)
    fresh = make_raw(tmp_path / "b", rows(60), 16)
    score(fresh)
    decide(fresh, dropped)
    run(PackConfig(shard_size=10), fresh, 1, RECIPE)
    assert tree(data.curated) == tree(fresh.curated)
    assert verify.run(data.curated).findings == []


def test_the_manifest_goes_first_and_comes_last(tmp_path: Path) -> None:
    data = packed(tmp_path, rows(40), shard_size=10)
    decide(data, {0: "filter:min_clip"})
    (data.raw / "00001.tar").write_bytes(b"")
    with pytest.raises(HeadraceError, match=r"00001\.tar"):
        run(PackConfig(shard_size=10), data, 1, RECIPE)
    assert not (data.curated / NAME).exists()
    assert verify.run(data.curated).findings[0].path == NAME


# --- what is refused -------------------------------------------------------------------------------


def test_nothing_left_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [*rows(5), Row(None, "dead")])
    score(data)
    decide(data, dict.fromkeys(range(5), "filter:min_clip"))
    with pytest.raises(HeadraceError, match=r"all 6 rows were dropped, 5 of them by filter:min_clip") as error:
        run(PackConfig(), data, 1, RECIPE)
    assert error.value.code == 1
    assert not data.curated.exists() and not (data.root / split.FILE).exists()


def test_dedup_decides_and_must_not_be_older_than_filter(tmp_path: Path) -> None:
    data = make_raw(tmp_path, rows(20))
    score(data)
    decide(data)
    dedup(data, drop={3: "dedup:near"})
    run(PackConfig(), data, 1, RECIPE)
    third = raw_table(data)["key"][3].as_py()
    assert third not in {row["key"] for which in ("train", "val") for row in samples(data, which)}
    decide(data, {4: "filter:min_clip"})
    before = tree(data.curated)
    with pytest.raises(HeadraceError, match="dedup is older than filter") as error:
        run(PackConfig(), data, 1, RECIPE)
    assert error.value.code == 4 and "curate dedup" in str(error.value.hint)
    assert tree(data.curated) == before


def test_no_decisions_and_a_half_scored_signal_are_named(tmp_path: Path) -> None:
    data = make_raw(tmp_path, rows(20))
    score(data)
    with pytest.raises(HeadraceError, match="no decisions") as error:
        run(PackConfig(), data, 1, RECIPE)
    assert error.value.code == 3
    decide(data)
    (data.markers / "score" / "clip" / "00001.json").unlink()
    with pytest.raises(HeadraceError, match="2 of 3 shards"):
        run(PackConfig(), data, 1, RECIPE)


def test_a_mixture_of_clips_is_refused(tmp_path: Path) -> None:
    data = packed(tmp_path, rows(20))
    marker = data.markers / "score" / "clip" / "00000.json"
    values = json.loads(marker.read_text())
    values["settings"]["identity"]["name"] = "other"
    marker.write_text(json.dumps(values))
    with pytest.raises(HeadraceError, match="more than one CLIP"):
        run(PackConfig(shard_size=20), data, 1, RECIPE)


# --- val -------------------------------------------------------------------------------------------


def test_no_near_copy_or_equal_caption_crosses_the_split(tmp_path: Path) -> None:
    captions = [f"scene {i // 2}" if i % 4 < 2 else f"only {i}" for i in range(80)]
    captions[9] = "  SCENE   4 "
    data = make_raw(tmp_path, [Row(picture(i, 32), caption) for i, caption in enumerate(captions)], 16)
    score(data)
    decide(data)
    pairs = [(i, i + 3) for i in range(0, 60, 6)]
    dedup(data, pairs)
    run(PackConfig(), data, 1, RECIPE)
    val = {row["key"] for row in samples(data, "val")}
    keys = raw_table(data)["key"].to_pylist()
    assert 0 < len(val) <= 8
    assert all((keys[a] in val) == (keys[b] in val) for a, b in pairs)
    by_caption: dict[str | None, set[bool]] = {}
    for key, caption in zip(keys, captions, strict=True):
        by_caption.setdefault(split.normalized(caption), set()).add(key in val)
    assert all(len(sides) == 1 for sides in by_caption.values())


def test_a_lists_own_split_is_obeyed_and_overlap_is_counted(tmp_path: Path) -> None:
    words = ["val", "train", None, "Validation", *["train"] * 26]
    listed = [Row(picture(i, 32), f"c {i}", extra={"split": word}) for i, word in enumerate(words)]
    listed[1].caption = listed[2].caption = listed[0].caption
    data = packed(tmp_path, listed)
    keys = raw_table(data)["key"].to_pylist()
    assert [row["key"] for row in samples(data, "val")] == [keys[0], keys[3]]
    assert read_manifest(data.curated / NAME)["split"] == {"val_samples_known_from_train": 1}
    assert {row["split"] for row in samples(data, "val")} == {"val", "Validation"}


def test_no_val_when_none_is_wanted_or_the_set_is_tiny(tmp_path: Path) -> None:
    data = packed(tmp_path, rows(5))
    assert not (data.curated / "val").exists()
    assert "validation" not in (data.curated / "README.md").read_text()
    assert verify.run(data.curated).findings == []


def test_the_size_of_val() -> None:
    sizes = [split.size_of_val(rows, 0.02) for rows in (5, 100, 2_560, 10_000, 100_000)]
    assert sizes == [0, 10, 256, 256, 2_000]
    assert split.size_of_val(100_000, 0) == 0


def test_large_groups_stay_in_train_and_val_is_filled() -> None:
    labels = np.concatenate([np.zeros(500, dtype=np.int64), np.arange(1, 4_501, dtype=np.int64)])
    uids = split.hashes(str(i) for i in range(5_000))
    val = split.held_out(labels, uids, np.full(5_000, -1, dtype=np.int8), 0.02)
    assert val.sum() == 256 and not val[:500].any()


def test_val_does_not_depend_on_the_order_of_rows() -> None:
    uids = split.hashes(str(i) for i in range(400))
    order = np.random.default_rng(0).permutation(400)
    own = np.full(400, -1, dtype=np.int8)
    labels = np.arange(400, dtype=np.int64) // 2
    one = split.held_out(labels, uids, own, 0.02)
    assert np.array_equal(one[order], split.held_out(labels[order], uids[order], own, 0.02))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=120),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 119)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_groups_never_cross(known: list[tuple[int, int]], pairs: list[tuple[int, int]], random: object) -> None:
    n = len(known)
    captions = split.hashes(None if caption == 0 else str(caption) for caption, _ in known)
    contents = split.hashes(None if content == 0 else str(content) for _, content in known)
    edges = np.array([(a % n, b % n) for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    labels = split.groups([captions, contents], (edges[:, 0], edges[:, 1]))
    own = np.array([random.choice([-1, -1, -1, 0, 1]) for _ in range(n)], dtype=np.int8)  # type: ignore[attr-defined]
    val = split.held_out(labels, split.hashes(str(i) for i in range(n)), own, 0.05)
    assert (val[own == 1]).all() and not val[own == 0].any()
    undecided_only = [label for label in set(labels.tolist()) if (own[labels == label] == -1).all()]
    for a, b in [*edges.tolist(), *((i, j) for i in range(n) for j in range(i) if captions[i] == captions[j] != 0)]:
        assert labels[a] == labels[b]
        if labels[a] in undecided_only:
            assert val[a] == val[b]
    for label in set(labels.tolist()):
        inside = own[labels == label]
        if not ((inside == 0).any() and (inside == 1).any()):
            assert len(set(val[labels == label].tolist())) == 1
    assert val.sum() <= max(split.size_of_val(n, 0.05), sum(val[np.isin(labels, labels[own == 1])]))


def test_other_picture_types_keep_their_extension(tmp_path: Path) -> None:
    data = make_raw(tmp_path, rows(4))
    score(data)
    decide(data)
    out = io.BytesIO()
    picture(7, 32).save(out, "PNG")
    path = data.raw / "00000.tar"
    found = list(read_tar(path))
    with path.open("wb") as file:
        tar = TarWriter(file)
        for i, sample in enumerate(found):
            extension, body = ("png", out.getvalue()) if i == 2 else ("jpg", jpeg(picture(i, 32)))
            tar.add(f"{sample.key}.{extension}", body)
        tar.close()
    marker = data.markers / "ingest" / "00000.json"
    values = json.loads(marker.read_text())
    values["outputs"]["raw/00000.tar"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    marker.write_text(json.dumps(values))
    run(PackConfig(), data, 1, RECIPE)
    kinds = [next(iter(sample.files)) for sample in read_tar(data.curated / "train" / "00000.tar")]
    assert kinds == ["jpg", "jpg", "png", "jpg"]
    assert "- name: png" in (data.curated / "README.md").read_text()
    assert verify.run(data.curated).findings == []
