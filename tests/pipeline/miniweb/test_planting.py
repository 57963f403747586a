"""The plan: every fault of the table is planted as often as it says, on URLs and captions that are what they claim."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from pipeline.base import HeadraceError
from pipeline.fetch.guard import normalise_url
from pipeline.miniweb import hosts, words
from pipeline.miniweb.faults import BY_NAME, CLEAN, FAULTS, GROUP, counts
from pipeline.miniweb.planters import COPIES, PLANTERS
from pipeline.miniweb.planting import build
from pipeline.miniweb.replies import address
from pipeline.miniweb.rows import PlannedUrl
from pipeline.miniweb.scenes import combination, held_out
from pipeline.signals.caption import Language, filename_like, normal, spam_like


@pytest.fixture(scope="module")
def plan() -> list[PlannedUrl]:
    return build(0, 3000, True)


def of(plan: list[PlannedUrl], fault: str) -> list[PlannedUrl]:
    return [row for row in plan if row.fault == fault]


def test_every_fault_has_a_planter_and_every_planter_a_fault() -> None:
    assert {*PLANTERS, *COPIES, "dup_original", "repeated_row"} == set(BY_NAME)
    assert len(BY_NAME) == len(FAULTS)


def test_counts_are_the_tables(plan: list[PlannedUrl]) -> None:
    seen = Counter(row.fault for row in plan)
    assert len(plan) == 3000 and {**seen} == {CLEAN: seen[CLEAN], **counts(3000)}
    assert 0.6 <= seen[CLEAN] / 3000 <= 0.65
    assert all(row.expected == (BY_NAME[row.fault].expected if row.fault != CLEAN else "keep") for row in plan)


def test_equal_arguments_give_equal_plans_and_another_seed_another(plan: list[PlannedUrl]) -> None:
    assert build(0, 3000, True) == plan
    assert not {row.url for row in build(1, 400, True)} & {row.url for row in plan if row.routes}


def test_clean_scenes_alone() -> None:
    rows = build(5, 500, False)
    assert {row.fault for row in rows} == {CLEAN} and len({row.url for row in rows}) == 500
    assert all((row.split == "val") == held_out(row.shown) for row in rows)
    assert 0.03 < sum(row.split == "val" for row in rows) / 500 < 0.1


def test_too_few_rows_are_refused_with_how_many_it_takes() -> None:
    with pytest.raises(HeadraceError) as error:
        build(0, 100, True)
    assert len(build(0, int(str(error.value.hint).split()[-2]), True)) > 100


def test_every_route_is_one_url_and_reaches_its_row(plan: list[PlannedUrl]) -> None:
    routes = [address(url) for row in plan for url, _ in row.routes]
    assert len(routes) == len(set(routes))
    for row in plan:
        if row.routes:
            normal, problem = normalise_url(str(row.url))
            assert problem is None and address(str(normal)) == address(row.routes[0][0])


def test_urls_that_are_never_asked_for(plan: list[PlannedUrl]) -> None:
    for fault, problem in (("invalid_url", "invalid_url"), ("scheme", "scheme"), ("private_address", None)):
        assert {normalise_url(str(row.url))[1] for row in of(plan, fault)} == {problem}
    assert {row.url for row in of(plan, "no_url")} == {None, ""}
    assert all(str(row.url).split("/")[2] in hosts.UNKNOWN for row in of(plan, "unknown_host"))


def test_about_fifty_hosts_answer(plan: list[PlannedUrl]) -> None:
    found = {address(url)[0] for row in plan for url, _ in row.routes}
    assert 50 <= len(found) <= 60 and all(host.endswith(f".{hosts.DOMAIN}") for host in found)


def test_no_two_pictures_share_a_combination_but_copies(plan: list[PlannedUrl]) -> None:
    owners: defaultdict[str, set[str | None]] = defaultdict(set)
    for row in plan:
        if row.fault != "repeated_row":
            owners[combination(row.shown)].add(row.group or row.url)
    assert all(len(rows) == 1 for rows in owners.values())


def test_groups_have_one_original_and_copies_of_its_scene(plan: list[PlannedUrl]) -> None:
    groups: defaultdict[str, list[PlannedUrl]] = defaultdict(list)
    for row in plan:
        assert (row.group is not None) == (row.expected == GROUP)
        if row.group:
            groups[row.group].append(row)
    for rows in groups.values():
        assert len({row.scene for row in rows}) == 1 and len({row.caption for row in rows}) == len(rows) >= 2
        assert sum(row.fault == "dup_original" for row in rows) == 1
        assert len({row.url for row in rows if row.fault != "dup_same_url"}) == len(rows) - sum(
            row.fault == "dup_same_url" for row in rows
        )


def test_exact_copies_have_the_originals_bytes(plan: list[PlannedUrl]) -> None:
    originals = {row.group: row.routes[0][1] for row in of(plan, "dup_original")}
    assert all(row.routes[0][1] == originals[row.group] for row in of(plan, "dup_exact"))
    assert not any(row.routes for row in of(plan, "dup_same_url"))


def test_repeated_rows_come_after_what_they_repeat(plan: list[PlannedUrl]) -> None:
    for i, row in enumerate(plan):
        if row.fault == "repeated_row":
            first = next(k for k, other in enumerate(plan) if (other.url, other.caption) == (row.url, row.caption))
            assert first < i and plan[first].fault == CLEAN


def test_held_out_scenes_are_val_and_wrong_captions_are_on_them(plan: list[PlannedUrl]) -> None:
    assert all((row.split == "val") == held_out(row.shown) for row in plan)
    assert all(row.split == "val" and not row.swaps for row in of(plan, "wrong_caption"))
    assert sum(row.split == "val" for row in of(plan, CLEAN)) >= 200


def test_captions_are_what_their_fault_says(plan: list[PlannedUrl]) -> None:
    assert {row.caption for row in of(plan, "null_caption")} == {None}
    assert {str(row.caption).strip() for row in of(plan, "empty_caption")} == {""}
    assert all(len(str(row.caption).split()) == 1 for row in of(plan, "one_word"))
    assert min(Counter(row.caption for row in of(plan, "repeated_caption")).values()) >= 24
    assert max(Counter(row.caption for row in of(plan, CLEAN)).values()) == 1
    longest = max(len(str(row.caption)) for row in of(plan, "long_caption"))
    assert 1_000_000 <= longest < 1_200_000
    assert len({row.caption for row in of(plan, "foreign_caption")}) == 48 and len(words.FOREIGN) >= 8


def test_planted_captions_are_told_from_true_ones_by_their_text(plan: list[PlannedUrl]) -> None:
    language = Language()

    def p_en(fault: str) -> list[float]:
        return [language.p_en(normal(str(row.caption))) for row in of(plan, fault)[:400]]

    assert max(p_en("foreign_caption")) < 0.1 < 0.2 < min(p_en(CLEAN) + p_en("wrong_caption"))
    assert all(spam_like(str(row.caption)) for row in of(plan, "spam_caption"))
    assert all(filename_like(str(row.caption)) for row in of(plan, "filename_caption"))
    for fault in (CLEAN, "wrong_caption", "repeated_caption", "long_caption", "foreign_caption"):
        assert not any(spam_like(text) or filename_like(text) for text in (str(row.caption) for row in of(plan, fault)))
