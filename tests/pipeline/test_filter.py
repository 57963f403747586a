from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import score
from pipeline.base import MISSING, HeadraceError
from pipeline.books import raw_markers, read_markers
from pipeline.fates import FILTER, KEPT, SUPERSEDED, effects, fates, funnel
from pipeline.filter import FilterConfig, run
from pipeline.miniweb import scenes
from pipeline.shards import DataDir, read_parquet, vectors, write_parquet
from pipeline.verdict.concepts import Concepts
from pipeline.verdict.verdicts import crowded, least_of_best, superseded
from tests.pipeline.factory import Row, make_raw, picture
from tests.pipeline.scored import add_signal


def pictures(root: Path, captions: list[str | None], side: int = 64, **extra: list[Any]) -> DataDir:
    rows = [
        Row(picture(i, side), caption, extra={name: values[i] for name, values in extra.items()})
        for i, caption in enumerate(captions)
    ]
    return make_raw(root, rows)


def decide(data: DataDir, **settings: Any) -> list[str | None]:
    run(FilterConfig(**settings), data)
    reasons: list[str | None] = read_parquet(data.root / FILTER)["reason"].to_pylist()
    return reasons


def test_without_rules_only_rows_without_a_picture_are_dropped(tmp_path: Path) -> None:
    errors = ["http_404: gone", "timeout", "too_many_pixels: 9", "HTTP Error 503: x", "Connection aborted!"]
    data = make_raw(tmp_path, [Row(picture(1), "a"), *(Row(None, "x", error=e, url=f"http://h/{e}") for e in errors)])
    assert decide(data) == [
        None,
        "fetch:http_404",
        "fetch:timeout",
        "image:too_many_pixels",
        "fetch:http_503",
        "fetch:other",
    ]


def test_a_stored_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(b"junk", "a"), Row(picture(1), "b")])
    add_signal(data, "image", decode_error=["bad", None], near_blank=[None, False])
    assert decide(data, drop_near_blank=True) == ["image:undecodable", None]


def test_thresholds_with_hand_computed_rows(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["one two three"] * 10)
    add_signal(data, "clip", clip_sim=[0.28, 0.2799, float("nan"), None, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    add_signal(data, "safety", nsfw=[0.1, 0.1, 0.1, 0.1, 0.2, 0.21, None, float("nan"), 0.0, 0.0])
    assert decide(data, min_clip=0.28, max_nsfw=0.2) == [
        None,
        "filter:min_clip",
        "filter:min_clip",
        "filter:min_clip",
        None,
        "filter:max_nsfw",
        "image:undecodable",
        "filter:max_nsfw",
        None,
        None,
    ]


def test_the_first_failing_rule_in_the_fixed_order_is_the_reason_and_all_are_named(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["word", "two words", None, "  "])
    add_signal(data, "caption", words=[1, 2, None, 0], spam_like=[True, False, None, False])
    add_signal(data, "safety", nsfw=[0.9, 0.9, 0.9, 0.0])
    settings = {"max_nsfw": 0.5, "min_words": 2, "drop_spam_captions": True}
    assert decide(data, **settings) == ["filter:min_words", "filter:max_nsfw", "filter:no_caption", "filter:no_caption"]
    assert read_parquet(data.root / FILTER)["fails"].to_pylist() == [
        ["min_words", "spam_caption", "max_nsfw"],
        ["max_nsfw"],
        ["no_caption", "min_words", "max_nsfw"],
        ["no_caption", "min_words"],
    ]
    found = {effect.rule: effect[1:] for effect in effects(data)}
    assert found == {
        "no_caption": (2, 2, 0),
        "min_words": (1, 3, 0),
        "spam_caption": (0, 1, 0),
        "max_nsfw": (1, 3, 1),
    }


def test_sides_are_those_of_the_source(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(picture(1, 64), "a"), Row(picture(2, 64).resize((64, 200)), "b")])
    assert decide(data, min_side=65) == ["filter:min_side", "filter:min_side"]
    assert decide(data, min_side=64, max_aspect=3.1) == [None, "filter:max_aspect"]
    assert decide(data, max_aspect=3.125) == [None, None]


def test_captions_shared_by_too_many_pictures_count_distinct_pictures_only(tmp_path: Path) -> None:
    same = picture(1)
    rows = [Row(picture(10 + i), text) for i, text in enumerate(["Buy now!", "buy  NOW", "buy, now", "'rare'", "rare"])]
    rows += [Row(same, "again", url=f"http://copy/{i}") for i in range(4)]
    rows += [Row(None, "rare", url=f"http://dead/{i}") for i in range(4)]
    data = make_raw(tmp_path, rows)
    many = ["filter:max_caption_repeats"] * 3
    assert decide(data, max_caption_repeats=2) == [*many, *[None] * 6, *["fetch:http_404"] * 4]
    assert decide(data, max_caption_repeats=1)[3:9] == [*many[:2], *[None] * 4]


def test_captions_without_letters_are_compared_as_they_are(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["★★★", "!!!", "--", None, None])
    assert decide(data, max_caption_repeats=1) == [None] * 5


def test_top_fraction_is_of_what_the_rules_before_it_keep(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["a b"] * 8)
    add_signal(data, "clip", clip_sim=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    add_signal(data, "safety", nsfw=[0, 0, 0, 0, 0, 0, 1, 1])
    kept = [reason is None for reason in decide(data, top_fraction=0.5, max_nsfw=0.5)]
    assert kept == [False, False, False, True, True, True, False, False]
    assert decide(data, top_fraction=0.5) == ["filter:top_fraction"] * 4 + [None] * 4


def test_best_fraction_rounds_up_and_ranks_nan_last() -> None:
    values = np.array([0.3, np.nan, 0.1, 0.2], dtype=np.float32)
    assert least_of_best(values, 0.5) == pytest.approx(0.2)
    assert least_of_best(values, 0.51) == pytest.approx(0.1)
    assert least_of_best(values, 1.0) == -np.inf
    assert least_of_best(values[:0], 0.5) == np.inf


def test_the_latest_fetched_row_of_a_uid_counts() -> None:
    uids = np.array([7, 8, 7, 9, 8, 7, 9], dtype=np.uint64)
    fetched = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    # 7: fetched at 0 and 2, failed later: 2 counts; 8: fetched at 0 only: 1 counts; 9: never fetched: the last counts
    assert superseded(uids, fetched).tolist() == [True, False, False, True, True, True, False]


def test_crowding_is_over_pairs_of_caption_and_picture() -> None:
    captions = np.array([1, 1, 1, 2, 2, 2], dtype=np.uint64)
    counted = np.ones(6, dtype=bool)
    shown = np.array([5, 6, 5, 5, 5, 5], dtype=np.uint64)
    assert crowded(captions, shown, counted, 1).tolist() == [True, True, True, False, False, False]
    assert not crowded(captions, shown, counted, 2).any()


def test_a_row_fetched_again_supersedes_its_failure_and_the_books_balance(tmp_path: Path) -> None:
    rows = [Row(picture(i), f"c {i}", url=f"http://a/{i}") for i in range(7)] + [Row(None, "late", url="http://a/late")]
    rows += [Row(picture(50), "late", url="http://a/late")]
    data = make_raw(tmp_path, rows)
    (data.urls / "00001.parquet").unlink()  # as `--retry-failed` leaves it: a raw shard without a list of its own
    listed = read_parquet(data.urls / "00000.parquet")
    never = pa.table(
        {name: ["x", "http://a/0", "c 0", "urls:repeated"][i : i + 1] for i, name in enumerate(listed.column_names)}
    )
    write_parquet(pa.concat_tables([listed, never], promote_options="permissive"), data.urls / "00000.parquet")

    assert decide(data) == [None] * 7 + [SUPERSEDED, None]
    assert [tuple(count) for count in funnel(data)] == [("urls", "repeated", 1), (KEPT, "", 8)]
    books = pa.concat_tables(fates(data))
    assert books["fate"].to_pylist() == [KEPT] * 8 + ["urls:repeated"]


def test_the_funnel_sums_to_the_input_rows(tmp_path: Path) -> None:
    data = make_raw(tmp_path, [Row(picture(i), "a" * i) if i % 3 else Row(None, str(i)) for i in range(20)])
    add_signal(data, "safety", nsfw=[0.05 * i if i % 3 else None for i in range(20)])
    decide(data, max_nsfw=0.5)
    counts = funnel(data)
    assert sum(count.rows for count in counts) == 20
    assert [count.stage for count in counts] == ["fetch", "filter", KEPT]
    assert pa.concat_tables(fates(data)).num_rows == 20


def test_where_sees_raw_signals_and_the_lists_own_columns(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["a 'quoted' cat", "dog", None], licence=["cc0", "by", "cc0"], width=[1, 2, 3])
    add_signal(data, "clip", clip_sim=[0.5, 0.1, None], image_emb=np.eye(3, dtype=np.float32))
    drop = "filter:where"
    assert decide(data, where="licence = 'cc0'") == [None, drop, None]
    assert decide(data, where="source_width < 3 AND width = 64") == [None, None, drop]
    assert decide(data, where="clip_sim > 0.2 -- a comment") == [None, drop, drop]
    assert decide(data, where="caption = 'a ''quoted'' cat' OR caption IS NULL") == [None, drop, None]
    assert decide(data, where="image_emb[1] = 1") == [None, drop, drop]


@pytest.mark.parametrize(
    "where",
    [
        "true; COPY raw TO '{file}'",
        "(SELECT count(*) FROM read_text('{file}')) > 0",
        "key IN (SELECT content FROM read_text('{file}'))",
        "EXISTS (FROM '{file}')",
        "true) FROM rows WHERE (true",
        "true), (false",
        "true) UNION SELECT (true",
        "count(*) OVER () > 1",
        "COLUMNS(*) IS NOT NULL",
        "count(*) > 1",
        "no_such_column > 1",
        "caption",
        "/*",
        "((((",
    ],
)
def test_where_is_one_condition_and_locked_down(tmp_path: Path, where: str) -> None:
    data = pictures(tmp_path / "data", ["a", "b"])
    file = tmp_path / "canary"
    file.write_text("x")
    with pytest.raises(HeadraceError) as caught:
        decide(data, where=where.format(file=file))
    assert "\n" not in caught.value.message and caught.value.hint
    assert file.read_text() == "x" and not (data.root / FILTER).exists()


def test_an_empty_condition_is_no_setting() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        FilterConfig(where="")


@pytest.mark.parametrize(
    ("settings", "signal"),
    [
        ({"min_clip": 0.2}, "clip"),
        ({"top_fraction": 0.2}, "clip"),
        ({"block": ["a gun"]}, "clip"),
        ({"max_nsfw": 0.2}, "safety"),
        ({"min_words": 2}, "caption"),
        ({"min_p_en": 0.5}, "caption"),
        ({"drop_near_blank": True}, "image"),
        ({"where": "clip_sim > 0.2"}, "clip"),
    ],
)
def test_a_rule_whose_signal_was_never_scored(tmp_path: Path, settings: dict[str, Any], signal: str) -> None:
    data = pictures(tmp_path, ["a", "b"])
    with pytest.raises(HeadraceError, match=signal) as caught:
        decide(data, **settings)
    assert caught.value.code == MISSING
    assert caught.value.hint and f"curate score --signals {signal}" in caught.value.hint


def test_a_signal_of_other_raw_rows_does_not_count(tmp_path: Path) -> None:
    data = pictures(tmp_path, ["a", "b"])
    add_signal(data, "safety", nsfw=[0.1, 0.9])
    marker = data.markers / "score" / "safety" / "00000.json"
    marker.write_text(marker.read_text().replace(raw_markers(data)[0].outputs["raw/00000.parquet"]["sha256"], "0" * 64))
    with pytest.raises(HeadraceError, match="safety"):
        decide(data, max_nsfw=0.5)


def test_nothing_to_do_twice_and_equal_bytes_when_made_again(tmp_path: Path) -> None:
    data = pictures(tmp_path, [f"caption {i}" for i in range(20)])
    add_signal(data, "safety", nsfw=[i / 20 for i in range(20)])
    assert run(FilterConfig(max_nsfw=0.5), data).done == 1
    before = (data.root / FILTER).read_bytes()
    assert run(FilterConfig(max_nsfw=0.5), data).done == 0
    (data.root / FILTER).unlink()
    summary = run(FilterConfig(max_nsfw=0.5), data)
    assert (data.root / FILTER).read_bytes() == before
    assert summary.fates == {KEPT: 11, "filter:max_nsfw": 9}
    assert read_markers(data, "filter")["all"].rows == 20
    assert run(FilterConfig(max_nsfw=0.6), data).fates[KEPT] == 13


def test_a_blocked_concept_is_found_in_pictures_by_the_clip_that_scored_them(tmp_path: Path) -> None:
    """Captions have no say: all of them are the same here."""
    shown = [scene for scene in (scenes.scene(31, i) for i in range(40)) if scene.relation]
    data = make_raw(tmp_path, [Row(scenes.draw(scene, 128), "a drawing") for scene in shown])
    score.run(score.ScoreConfig(signals=["clip"]), data)
    blocked = [reason is not None for reason in decide(data, block=["a heart"], block_threshold=0.7)]
    hearts = [any(thing.shape == "heart" for thing in scene.objects) for scene in shown]
    found = sum(heart and drop for heart, drop in zip(hearts, blocked, strict=True))
    assert found >= sum(hearts) / 2  # a small CLIP
    assert sum(blocked) - found <= 1
    tables = [read_parquet(path) for path in sorted((data.root / "signals" / "clip").glob("*.parquet"))]
    stored = np.concatenate([vectors(table["image_emb"]) for table in tables]).astype(np.float32)
    shown_by = Concepts.of(data, ["a heart"], 0.7).probability(stored)
    assert blocked == (shown_by >= 0.7).tolist()
    assert 0.7 < shown_by.max() < 1
    assert set(decide(data, block=["a heart"], block_threshold=(1 + float(shown_by.max())) / 2)) == {None}
