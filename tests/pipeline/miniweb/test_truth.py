"""Planted against caught, on outcomes made by hand."""

from __future__ import annotations

from dataclasses import replace

from pipeline.miniweb.faults import GROUP
from pipeline.miniweb.truth import Outcome, Planted, is_right, judged, planted_lines, planted_table


def row(uid: str, got: str, fault: str = "none", expected: str = "keep", **more: str | None) -> Outcome:
    known = {"url": f"http://a.test/{uid}", "group": None, "split": "train", "kept_uid": None}
    return Outcome(uid=uid, fault=fault, expected=expected, got=got, **{**known, **more})


def copies(*kept: tuple[str, str], group: str = "g") -> list[Outcome]:
    """Rows of one group: (got, uid of the kept row)."""
    return [
        row(
            f"{group}{i}",
            got,
            "dup_original" if i == 0 else "dup_cropped",
            GROUP,
            group=group,
            kept_uid=kept_uid,
        )
        for i, (got, kept_uid) in enumerate(kept)
    ]


def test_a_token_stands_for_what_it_begins_and_alternatives_are_allowed() -> None:
    assert is_right("dedup:near", "dedup") and is_right("fetch:http_404", "fetch:http_404")
    assert is_right("filter:min_clip", "filter:spam_caption|filter:min_clip")
    assert not is_right("fetch:http_40", "fetch:http_404") and not is_right("dedupe", "dedup")


def test_counts_by_fault_with_what_went_wrong() -> None:
    bad = row("c", "keep", "http_404", "fetch:http_404")
    table = planted_table([row("a", "keep"), row("b", "fetch:http_404", "http_404", "fetch:http_404"), bad])
    assert [(f.fault, f.planted, f.caught) for f in table.faults] == [("none", 1, 1), ("http_404", 2, 1)]
    assert table.faults[1].others == (("keep", 1),)
    assert "http_404: 1 not fetch:http_404, but 1 keep" in planted_lines(table)


def test_a_group_is_right_when_exactly_one_is_kept() -> None:
    good = copies(("keep", "g0"), ("dedup:near", "g0"), ("dedup:exact", "g0"))
    both = copies(("keep", "h0"), ("keep", "h1"), group="h")
    none = copies(("dedup:near", "x"), ("dedup:near", "x"), group="i")
    lost = copies(("keep", "j0"), ("filter:min_clip", ""), group="j")
    assert judged([*good, *both, *none, *lost]) == [True] * 3 + [False] * 2 + [False] * 2 + [True, False]


def test_rows_of_one_uid_share_their_fates_in_any_order() -> None:
    clean, again = row("a", "urls:repeated"), row("a", "keep", "repeated_row", "urls:repeated")
    assert judged([clean, again]) == [True, True]
    assert judged([clean, replace(again, got="urls:repeated")]) == [False, True]


def test_duplicate_pairs_by_recall_and_precision() -> None:
    # one group of three found whole, one of two not found, and a distinct pair found wrongly
    rows = copies(("keep", "g0"), ("dedup:near", "g0"), ("dedup:near", "g0"))
    rows += copies(("keep", "h0"), ("keep", "h1"), group="h")
    rows += [row("a", "keep", kept_uid="a"), row("b", "dedup:near", kept_uid="a")]
    rows += [row("z", "filter:min_clip", "dup_cropped", GROUP, group="h")]  # never compared
    pairs = planted_table(rows).duplicates
    assert (pairs.planted, pairs.found, pairs.right) == (4, 4, 3)
    assert pairs.recall == pairs.precision == 0.75


def test_captions_are_judged_on_held_out_rows_alone() -> None:
    wrong = ("wrong_caption", "filter:min_clip")
    rows = [row(f"w{i}", "filter:min_clip" if i < 3 else "keep", *wrong, split="val") for i in range(4)]
    rows += [row(f"g{i}", "filter:min_clip" if i == 0 else "keep", split="val") for i in range(10)]
    rows += [row("t", "filter:min_clip", split="train"), row("u", "fetch:dns", split="val")]
    captions = planted_table(rows).captions
    assert (captions.wrong, captions.wrong_dropped, captions.good, captions.good_lost) == (4, 3, 11, 1)
    assert captions.dropped_share == 0.75 and abs(captions.lost_share - 1 / 11) < 1e-12


def test_nothing_planted_is_nothing_missed() -> None:
    empty: Planted = planted_table([])
    assert empty.faults == () and empty.duplicates.recall == empty.captions.dropped_share == 1.0
    assert planted_lines(empty) == []
