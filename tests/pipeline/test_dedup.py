"""Deduplication: which pairs are near, which row of a group stays, and sets that ours must not repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.base import MISSING, REFUSED, HeadraceError, parse_config
from pipeline.dedup import DedupConfig, run
from pipeline.fates import DEDUP, PAIRS, funnel, verdicts
from pipeline.filter import FilterConfig
from pipeline.filter import run as run_filter
from pipeline.near.choice import Links, choose, components, keep_order
from pipeline.near.neighbours import FLOOR, Fingerprints, Near, between, cosines, near_pairs, nodes
from pipeline.shards import DataDir, read_parquet
from tests.pipeline.factory import Row, jpeg, make_raw, picture
from tests.pipeline.scored import add_signal

NEAR = Near(hamming=4, cosine=0.9, far_hamming=16, far_cosine=0.97, alone=4)


def unit(rng: np.random.Generator, count: int, dimension: int = 16) -> NDArray[np.float16]:
    """Random unit vectors, far from each other."""
    values = rng.normal(size=(count, dimension))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def with_copies(seed: int, groups: int, copies: int, spread: float, flips: int) -> Fingerprints:
    """`groups` pictures with some near-copies each, and hashes with up to `flips` bits changed."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(unit(rng, groups), copies, axis=0).astype(np.float64)
    vectors += rng.normal(scale=spread, size=vectors.shape) * rng.integers(0, 2, (len(vectors), 1))
    hashes = np.repeat(rng.integers(0, 2**63, groups, dtype=np.uint64), copies)
    for _ in range(flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
    return Fingerprints(hashes, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))


def brute(prints: Fingerprints, near: Near) -> set[tuple[int, int]]:
    """All near pairs, one by one."""
    assert prints.vectors is not None and prints.hashes is not None
    a, b = np.triu_indices(len(prints), 1)
    hamming = np.array([int(x ^ y).bit_count() for x, y in zip(prints.hashes[a], prints.hashes[b], strict=True)])
    hold = near.holds(cosines(prints.vectors, prints.vectors, a, b), hamming)
    return set(zip(a[hold].tolist(), b[hold].tolist(), strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 0.1), st.integers(0, 6))
def test_pairs_are_those_of_brute_force_once_equal_rows_are_expanded(
    seed: int, copies: int, spread: float, flips: int
) -> None:
    prints = with_copies(seed, 12, copies, spread, flips)
    found = near_pairs(prints, np.arange(len(prints), dtype=np.uint64), NEAR).pairs
    assert (found.a < found.b).all()
    first, node = nodes(prints, np.arange(len(prints), dtype=np.uint64))
    pairs = {(x, y) for x, y in zip(found.a.tolist(), found.b.tolist(), strict=True)}
    linked = {tuple(sorted((int(node[x]), int(node[y])))) for x, y in pairs}
    for a, b in brute(prints, NEAR):
        assert node[a] == node[b] or tuple(sorted((int(node[a]), int(node[b])))) in linked
    assert len({pair for pair in pairs if node[pair[0]] == node[pair[1]]}) == len(node) - len(first)
    assert pairs <= brute(prints, NEAR)


def test_a_thousand_equal_pictures_make_a_star() -> None:
    prints = Fingerprints(
        np.full(1000, 0x00FF00FF00FF00FF, np.uint64), np.repeat(unit(np.random.default_rng(0), 1), 1000, 0)
    )
    found = near_pairs(prints, np.zeros(1000, np.uint64), NEAR)
    assert found.capped == 0 and found.pairs.a.tolist() == [0] * 999
    assert found.pairs.cosine is not None and (found.pairs.cosine == 1).all()


def test_more_neighbours_than_the_cap_are_cut_and_counted() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng, 1).astype(np.float64) + rng.normal(scale=1e-3, size=(700, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    prints = Fingerprints(None, vectors.astype(np.float16))
    found = between(prints, prints, NEAR, within=True)
    assert found.capped > 0 and len(found.pairs.a) <= 700 * 512


def test_the_hash_alone_knows_no_colour_so_plain_pictures_are_not_compared() -> None:
    flat, good = 0x8000000000000000, 0x0F0F0F0F0F0F0F0F
    hashes = np.array([flat, flat, good, good ^ 0b1111, good ^ 0b11111 << 20], np.uint64)
    found = near_pairs(Fingerprints(hashes, None), np.array([1, 2, 3, 4, 5], np.uint64), NEAR).pairs
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == [(2, 3)]
    same_bytes = near_pairs(Fingerprints(hashes, None), np.array([1, 1, 3, 4, 5], np.uint64), NEAR).pairs
    assert list(zip(same_bytes.a.tolist(), same_bytes.b.tolist(), strict=True)) == [(0, 1), (2, 3)]


def test_near_hashes_need_vectors_that_agree() -> None:
    cosine = np.array([0.95, 0.89, 0.98, 0.96, 0.98], np.float32)
    hamming = np.array([4, 0, 16, 5, 17], np.int32)
    assert NEAR.holds(cosine, hamming).tolist() == [True, False, True, False, False]
    assert NEAR.holds(cosine, None).tolist() == [False, False, True, False, True]
    assert NEAR.holds(None, hamming).tolist() == [True, True, False, False, False]


# --- the choice -----------------------------------------------------------------------------------


def links(*pairs: tuple[int, int, float]) -> Links:
    a, b, cosine = (np.array(column) for column in zip(*pairs, strict=True))
    return Links(a, b, cosine.astype(np.float32), np.full(len(a), 5, np.int32))


def test_nothing_chains() -> None:
    chain = links((0, 1, 0.98), (1, 2, 0.98), (2, 3, 0.98))
    every = np.ones(3, dtype=bool)
    chosen = choose(chain, every, np.ones(4, dtype=bool), np.arange(4))
    assert chosen.kept.tolist() == [-1, 0, -1, 2]
    chosen = choose(chain, every, np.ones(4, dtype=bool), np.array([1, 0, 2, 3]))
    assert chosen.kept.tolist() == [1, -1, 1, -1]


def test_a_row_that_the_filter_drops_stands_for_nothing() -> None:
    chain = links((0, 1, 0.98), (1, 2, 0.98))
    eligible = np.array([True, False, True])
    assert choose(chain, np.ones(2, dtype=bool), eligible, np.array([1, 0, 2])).kept.tolist() == [-1, -1, -1]


def test_of_several_that_stay_the_nearest_is_named() -> None:
    chosen = choose(links((0, 2, 0.975), (1, 2, 0.99)), np.ones(2, dtype=bool), np.ones(3, dtype=bool), np.arange(3))
    assert chosen.kept.tolist() == [-1, -1, 1]
    assert chosen.cosine[2] == np.float32(0.99) and chosen.hamming[2] == 5


def test_equal_rows_are_decided_together_whatever_the_filter_drops_of_them() -> None:
    star = Links(
        np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([1, 1, 0.98], np.float32), np.array([0, 0, 3], np.int32)
    )
    eligible = np.array([False, True, True, True])  # the first of the equal ones is filtered out
    chosen = choose(star, np.ones(3, dtype=bool), eligible, np.array([0, 2, 1, 3]))
    assert chosen.kept.tolist() == [-1, 2, -1, 2]
    assert chosen.cosine[1] == 1 and chosen.cosine[3] == np.float32(0.98)
    chosen = choose(star, np.ones(3, dtype=bool), eligible, np.array([0, 2, 1, 0]))
    assert chosen.kept.tolist() == [-1, 3, 3, -1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000))
def test_every_dropped_row_is_near_the_one_kept_and_no_two_kept_are_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prints = with_copies(seed, 8, 5, 0.05, 3)
    found = near_pairs(prints, np.arange(40, dtype=np.uint64), NEAR).pairs
    assert found.cosine is not None and found.hamming is not None
    every = Links(found.a, found.b, found.cosine, found.hamming)
    eligible, place = rng.random(40) < 0.8, rng.permutation(40)
    chosen = choose(every, NEAR.holds(found.cosine, found.hamming), eligible, place)
    near = brute(prints, NEAR)
    dropped = np.flatnonzero(chosen.kept >= 0)
    for row in dropped.tolist():
        kept = int(chosen.kept[row])
        assert eligible[row] and eligible[kept] and chosen.kept[kept] < 0 and place[kept] < place[row]
        assert (min(row, kept), max(row, kept)) in near
    stay = np.flatnonzero(eligible & (chosen.kept < 0)).tolist()
    assert not [(a, b) for a in stay for b in stay if (a, b) in near]


def test_keep_order_is_sides_then_similarity_then_uid() -> None:
    short = np.array([10, 20, 20, 20, 20, 20], np.int32)
    long = np.array([99, 30, 31, 30, 30, 30], np.int32)
    similarity = np.array([0.9, 0.1, 0.1, 0.2, np.nan, 0.1], np.float32)
    assert np.argsort(keep_order(short, long, similarity, np.array([0, 5, 2, 3, 4, 1]))).tolist() == [2, 3, 5, 1, 4, 0]


def test_components_go_by_the_least_row() -> None:
    assert components(6, np.array([4, 1]), np.array([3, 4])).tolist() == [-1, 1, -1, 1, 1, -1]


# --- the stage ------------------------------------------------------------------------------------


def duplicates(root: Path, order: list[int] | None = None) -> DataDir:
    """Ten pictures; 0 and 1 have the same bytes, 2 is a near copy of 0 and 3 of 2 but not of 0, 9 has no picture."""
    rng = np.random.default_rng(1)
    vectors = unit(rng, 10, 64).astype(np.float64)
    hashes = rng.integers(0, 2**63, 10, dtype=np.uint64)
    vectors[1], hashes[1] = vectors[0], hashes[0]
    aside = vectors[4] - (vectors[4] @ vectors[0]) * vectors[0]
    aside /= np.linalg.norm(aside)
    for row, angle in ((2, 0.18), (3, 0.36)):  # cosine 0.984 to the one before, 0.936 to the one before that
        vectors[row] = np.cos(angle) * vectors[0] + np.sin(angle) * aside
        hashes[row] = hashes[0] ^ np.uint64(0x3F << 6 * (row - 2))
    vectors[9] = np.nan
    shots = [picture(0), picture(0), *(picture(i, 96 - i) for i in range(2, 9)), None]
    rows = [Row(shot, f"caption '{i}'", url=f"http://h/{i}") for i, shot in enumerate(shots)]
    order = order or list(range(10))
    data = make_raw(root, [rows[i] for i in order], shard_size=4)
    add_signal(data, "phash", phash=[None if i == 9 else int(hashes[i]) for i in order])
    identity = {"name": "mini", "weights_sha256": "0"}
    sims = [None if i == 9 else 0.3 - i / 100 for i in order]
    add_signal(data, "clip", identity, clip_sim=sims, image_emb=vectors[order].astype(np.float32))
    run_filter(FilterConfig(), data)
    return data


def by_url(data: DataDir) -> dict[str, tuple[Any, ...]]:
    """Per url: the reason, the url of the one kept, and the cluster."""
    raws = [read_parquet(path) for path in sorted(data.raw.glob("*.parquet"))]
    urls = [url for raw in raws for url in raw["url"].to_pylist()]
    keys = [key for raw in raws for key in raw["key"].to_pylist()]
    names = dict(zip(keys, urls, strict=True)) | {None: None}
    rows = read_parquet(data.root / DEDUP).to_pylist()
    assert [row["key"] for row in rows] == keys
    return {names[row["key"]]: (row["reason"], names[row["kept_key"]], row["cluster"]) for row in rows}


def test_the_stage_keeps_the_best_and_says_why_the_others_went(tmp_path: Path) -> None:
    data = duplicates(tmp_path)
    summary = run(DedupConfig(), data)
    found = by_url(data)
    assert found["http://h/0"][:2] == (None, None)
    assert found["http://h/1"][:2] == ("dedup:exact", "http://h/0")
    assert found["http://h/2"][:2] == ("dedup:near", "http://h/0")
    assert found["http://h/3"][:2] == (None, None), "near 2, which is dropped, but not near 0"
    assert found["http://h/9"][:2] == ("fetch:http_404", None)
    clusters = {found[f"http://h/{i}"][2] for i in range(4)}
    assert len(clusters) == 1 and None not in clusters and found["http://h/5"][2] is None
    assert summary.fates == {"kept": 7, "dedup:exact": 1, "dedup:near": 1, "fetch:http_404": 1}
    assert verdicts(data) == data.root / DEDUP
    assert sum(count.rows for count in funnel(data)) == 10
    row = read_parquet(data.root / DEDUP).to_pylist()[2]
    assert row["cosine"] == pytest.approx(np.cos(0.18), abs=1e-3) and row["hamming"] == 6


def test_the_result_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    found = []
    for name, order in (("a", None), ("b", [9, 3, 1, 7, 0, 5, 2, 8, 6, 4])):
        data = duplicates(tmp_path / name, order)
        run(DedupConfig(), data)
        found.append(by_url(data))
    assert found[0] == found[1]


def test_equal_input_gives_equal_bytes_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    first, second = duplicates(tmp_path / "a"), duplicates(tmp_path / "b")
    for data in (first, second):
        assert run(DedupConfig(), data).done == 1
        assert run(DedupConfig(), data).done == 0
    for name in (PAIRS, DEDUP):
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes()


def test_a_new_filter_or_threshold_decides_again_without_a_new_search(tmp_path: Path) -> None:
    data = duplicates(tmp_path)
    run(DedupConfig(), data)
    before = (data.root / PAIRS).stat().st_mtime_ns
    run_filter(FilterConfig(where="url <> 'http://h/0' AND url <> 'http://h/1'"), data)
    assert verdicts(data) != data.root / DEDUP, "dedup's verdicts are of another filter now"
    run(DedupConfig(), data)
    found = by_url(data)
    assert found["http://h/2"][:2] == (None, None) and found["http://h/3"][:2] == ("dedup:near", "http://h/2")
    run(DedupConfig(crop_cosine=0.99), data)
    assert by_url(data)["http://h/3"][:2] == (None, None)
    assert (data.root / PAIRS).stat().st_mtime_ns == before


def test_thresholds_are_within_what_is_remembered() -> None:
    for name, value in (("max_hamming", 9), ("min_cosine", 0.8), ("crop_hamming", 21), ("crop_cosine", 0.95)):
        with pytest.raises(HeadraceError, match=name):
            parse_config(DedupConfig, {name: value}, "the recipe")
    for name in ("hamming", "far_hamming", "cosine", "far_cosine", "alone"):
        field = {"far_hamming": "crop_hamming", "far_cosine": "crop_cosine", "cosine": "min_cosine"}.get(name, name)
        field = {"hamming": "max_hamming", "alone": "max_hamming_alone"}.get(field, field)
        limits = DedupConfig.model_json_schema()["properties"][field]
        assert getattr(FLOOR, name) == limits["maximum" if "hamming" in field else "minimum"]


def test_without_filter_or_signals_the_missing_stage_is_named(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(picture(0), "a")])
    with pytest.raises(HeadraceError, match="phash") as caught:
        run(DedupConfig(), data)
    assert caught.value.code == MISSING and "curate score --signals phash" in str(caught.value.hint)
    add_signal(data, "phash", phash=[1])
    with pytest.raises(HeadraceError, match="filter") as caught:
        run(DedupConfig(), data)
    assert caught.value.code == MISSING


def test_the_hash_alone_works_without_the_clip_signal(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(picture(i), f"c {i}") for i in range(3)])
    add_signal(data, "phash", phash=[0x0F0F0F0F0F0F0F0F, 0x0F0F0F0F0F0F0F00, 0x0F0F0F0F00000FFF])
    run_filter(FilterConfig(), data)
    run(DedupConfig(), data)
    rows = read_parquet(data.root / DEDUP)
    assert sorted(map(str, rows["reason"].to_pylist())) == ["None", "None", "dedup:near"]
    assert set(rows["cosine"].to_pylist()) == {None} and set(rows["hamming"].to_pylist()) == {None, 4}


def test_against_a_data_folder_drops_what_is_near_it(tmp_path: Path) -> None:
    data, held = duplicates(tmp_path / "ours"), duplicates(tmp_path / "held", [2, 5])
    run(DedupConfig(against=str(held.root)), data)
    found = by_url(data)
    assert {url for url, (reason, *_) in found.items() if reason == "dedup:against"} == {
        f"http://h/{i}" for i in (0, 1, 2, 3, 5)
    }
    rows = {row["key"]: row for row in read_parquet(data.root / DEDUP).to_pylist()}
    assert rows["000000000"]["kept_key"] is None and rows["000000000"]["against_key"] == "000000000"
    run(DedupConfig(), data)
    assert by_url(data)["http://h/5"][0] is None
    assert not (data.root / "decisions" / "against.parquet").exists()


def test_against_a_set_of_another_clip_is_refused(tmp_path: Path) -> None:
    data, held = duplicates(tmp_path / "ours"), duplicates(tmp_path / "held", [2, 5])
    add_signal(held, "clip", {"name": "other", "weights_sha256": "1"}, clip_sim=[0.1, 0.1], image_emb=np.eye(2, 64))
    with pytest.raises(HeadraceError, match="CLIP") as caught:
        run(DedupConfig(against=str(held.root)), data)
    assert caught.value.code == REFUSED


def test_against_a_folder_of_pictures(tmp_path: Path) -> None:
    from pipeline.score import ScoreConfig
    from pipeline.score import run as run_score

    data = make_raw(tmp_path / "data", [Row(picture(i), f"c {i}") for i in range(4)])
    run_score(ScoreConfig(signals=["phash"]), data)
    run_filter(FilterConfig(), data)
    (tmp_path / "held" / "deep").mkdir(parents=True)
    (tmp_path / "held" / "deep" / "shot.jpg").write_bytes(jpeg(picture(2).resize((80, 80)), 80))
    (tmp_path / "held" / "broken.png").write_bytes(b"not a picture")
    run(DedupConfig(against=str(tmp_path / "held")), data)
    rows = read_parquet(data.root / DEDUP).to_pylist()
    assert [row["reason"] for row in rows] == [None, None, "dedup:against", None]
    assert rows[2]["against_key"] == "deep/shot.jpg"
    with pytest.raises(HeadraceError, match="no folder of pictures") as caught:
        run(DedupConfig(against=str(tmp_path / "nowhere")), data)
    assert caught.value.code == MISSING


@pytest.mark.slow
def test_planted_copies_of_scenes_are_found_and_distinct_scenes_are_not(tmp_path: Path) -> None:
    from pipeline.miniweb.content import generator
    from pipeline.miniweb.pictures import Picture, encode
    from pipeline.miniweb.planters import COPIES, _edited
    from pipeline.miniweb.scenes import scene
    from pipeline.score import ScoreConfig
    from pipeline.score import run as run_score

    rows = []
    for index in range(200):
        shown = scene(11, index)
        rows.append(Row(encode(Picture(shown)), f"scene {index}", url=f"http://h/{index}/original"))
        for name in COPIES[2:]:
            edit = _edited(name, index, generator("test", index).random(8).tolist())
            rows.append(Row(encode(Picture(shown, **edit)), f"scene {index}", url=f"http://h/{index}/{name}"))
    data = make_raw(tmp_path, rows, shard_size=500)
    run_score(ScoreConfig(signals=["phash", "clip"]), data)
    run_filter(FilterConfig(), data)
    run(DedupConfig(), data)
    scenes = {url: url.split("/")[3] for url in by_url(data)}
    kept = [scenes[url] for url, (_, other, _) in by_url(data).items() if other is None]
    pairs = [(scenes[url], scenes[other]) for url, (_, other, _) in by_url(data).items() if other is not None]
    recall = (len(rows) - len(kept)) / (len(rows) - len(set(scenes.values())))
    precision = sum(a == b for a, b in pairs) / len(pairs)
    print(f"copies found {recall:.4f}, right {precision:.4f}")
    assert recall >= 0.97 and precision >= 0.99


def test_against_a_packed_set_drops_what_it_holds(tmp_path: Path) -> None:
    from pipeline.pack import PackConfig
    from pipeline.pack import run as run_pack
    from pipeline.score import ScoreConfig
    from pipeline.score import run as run_score

    ours, held = (
        make_raw(tmp_path / name, [Row(picture(i), f"c {i}") for i in chosen])
        for name, chosen in (("ours", range(6)), ("held", range(4, 9)))
    )
    for data in (ours, held):
        run_score(ScoreConfig(signals=["phash"]), data)
        run_filter(FilterConfig(), data)
        run(DedupConfig(), data)
    run_pack(PackConfig(), held, 1, {})
    run(DedupConfig(against=str(held.curated)), ours)
    assert [row["reason"] for row in read_parquet(ours.root / DEDUP).to_pylist()] == [None] * 4 + ["dedup:against"] * 2


def test_a_held_out_set_may_have_a_wider_berth_than_our_own_pictures(tmp_path: Path) -> None:
    held, ours = (make_raw(tmp_path / name, [Row(picture(i), f"c {i}") for i in range(3)]) for name in ("held", "ours"))
    first, far = 0x0F0F0F0F0F0F0F0F, 0x3333333333333333
    add_signal(held, "phash", phash=[first, far, far ^ 0xFFFF])
    # Bits from the first held-out one: 6, 8 and 6; the last two are 2 from one another.
    add_signal(ours, "phash", phash=[first ^ 0x3F, first ^ 0xFF << 56, first ^ 0xFC << 56])
    for data in (held, ours):
        run_filter(FilterConfig(), data)
    found = {}
    for own, berth in ((0, None), (0, 6), (0, 8), (2, None), (8, 0)):
        run(DedupConfig(against=str(held.root), max_hamming_alone=own, against_hamming_alone=berth), ours)
        table = read_parquet(ours.root / DEDUP)
        found[own, berth] = sorted(str(reason).removeprefix("dedup:") for reason in table["reason"].to_pylist())
    assert found == {
        (0, None): ["None", "None", "None"],
        (0, 6): ["None", "against", "against"],
        (0, 8): ["against", "against", "against"],
        (2, None): ["None", "None", "near"],
        (8, 0): ["None", "None", "near"],
    }
