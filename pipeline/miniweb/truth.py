"""Planted against caught: what became of the mini-web's rows, measured against what should have. Pure functions.

It does not know how fates come about, nor how the figures are shown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline.miniweb.faults import BY_NAME, CLEAN, GROUP

KEEP = "keep"


@dataclass(frozen=True)
class Outcome:
    """A row of the list and its fate; `got` is `keep` or `stage:reason`.

    `group` names the rows that are copies of each other. `kept_uid` is the uid of the row that was kept in this one's
    place, its own where it was kept, None where it never came to a comparison.
    """

    uid: str
    url: str | None
    fault: str
    expected: str
    group: str | None
    split: str | None
    got: str
    kept_uid: str | None


@dataclass(frozen=True)
class FaultCount:
    """How often a fault was planted and had the right fate; `others` counts the wrong ones."""

    fault: str
    expected: str
    planted: int
    caught: int
    others: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Duplicates:
    """Pairs of near-copies that both came to the comparison, pairs that share a kept row, and those that are both."""

    planted: int
    found: int
    right: int

    @property
    def recall(self) -> float:
        return self.right / self.planted if self.planted else 1.0

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0


@dataclass(frozen=True)
class Captions:
    """Held-out rows with another picture's caption, and clean held-out rows: how many `min_clip` dropped of each."""

    wrong: int
    wrong_dropped: int
    good: int
    good_lost: int

    @property
    def dropped_share(self) -> float:
        return self.wrong_dropped / self.wrong if self.wrong else 1.0

    @property
    def lost_share(self) -> float:
        return self.good_lost / self.good if self.good else 0.0


@dataclass(frozen=True)
class Planted:
    faults: tuple[FaultCount, ...]
    duplicates: Duplicates
    captions: Captions


def planted_table(rows: Iterable[Outcome]) -> Planted:
    """The figures of a run, faults in the order of their table and the clean rows first."""
    rows = list(rows)
    right = judged(rows)
    by_fault: defaultdict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_fault[row.fault].append(i)
    names = [name for name in (CLEAN, *BY_NAME) if name in by_fault]
    return Planted(
        faults=tuple(
            _count(name, [rows[i] for i in by_fault[name]], [right[i] for i in by_fault[name]]) for name in names
        ),
        duplicates=_duplicates(rows),
        captions=_captions(rows),
    )


def is_right(got: str, expected: str) -> bool:
    """Whether a fate is the expected one: `a|b` allows either, and a token stands for all that it begins."""
    return any(got == token or got.startswith(f"{token}:") for token in expected.split("|"))


def judged(rows: Sequence[Outcome]) -> list[bool]:
    """For each row whether its fate is right. A group is right as one: exactly one kept, the others dropped as copies.

    Rows of one uid are the same row to everybody, so their fates are compared as a whole, in any order.
    """
    right = [is_right(row.got, row.expected) for row in rows]
    groups, twins = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for i, row in enumerate(rows):
        twins[row.uid].append(i)
        if row.expected == GROUP and row.group is not None:
            groups[row.group].append(i)
    for members in groups.values():
        kept = sum(rows[i].got == KEEP for i in members)
        for i in members:
            right[i] = kept == 1 and (rows[i].got == KEEP or is_right(rows[i].got, "dedup"))
    for members in twins.values():
        if len(members) > 1:
            pending = [rows[i].got for i in members]
            for i in members:
                found = next((got for got in pending if is_right(got, rows[i].expected)), None)
                right[i] = found is not None
                if found is not None:
                    pending.remove(found)
    return right


def _count(fault: str, rows: Sequence[Outcome], right: Sequence[bool]) -> FaultCount:
    others = Counter(row.got for row, ok in zip(rows, right, strict=True) if not ok)
    return FaultCount(fault, rows[0].expected, len(rows), sum(right), tuple(others.most_common()))


def _duplicates(rows: Sequence[Outcome]) -> Duplicates:
    compared = [row for row in rows if row.kept_uid is not None]
    planted = _pairs((row.group, row.uid) for row in compared)
    found = _pairs((row.kept_uid, row.uid) for row in compared)
    return Duplicates(len(planted), len(found), len(planted & found))


def _pairs(named: Iterable[tuple[str | None, str]]) -> set[tuple[str, str]]:
    """All pairs of uids that share a name."""
    sets: defaultdict[str, set[str]] = defaultdict(set)
    for name, uid in named:
        if name is not None:
            sets[name].add(uid)
    return {pair for uids in sets.values() for pair in combinations(sorted(uids), 2)}


def _captions(rows: Sequence[Outcome]) -> Captions:
    held = [row for row in rows if row.split == "val"]
    wrong = [row.got for row in held if row.fault == "wrong_caption"]
    good = [row.got for row in held if row.fault == CLEAN]
    low = BY_NAME["wrong_caption"].expected
    return Captions(
        wrong=len(wrong),
        wrong_dropped=sum(is_right(got, low) for got in wrong),
        good=len(good),
        good_lost=sum(is_right(got, low) for got in good),
    )


def planted_lines(planted: Planted, columns: int = 3, width: int = 30) -> list[str]:
    """The figures as text: every fault as `name caught/planted`, then what went wrong, then the two measures."""
    cells = [f"{count.fault:<{width - 10}}{count.caught:>5}/{count.planted:<4}" for count in planted.faults]
    height = -(-len(cells) // columns)
    lines = ["  ".join(cells[i::height]).rstrip() for i in range(height)]
    for count in planted.faults:
        if count.others:
            fates = ", ".join(f"{number} {got}" for got, number in count.others)
            lines.append(f"{count.fault}: {count.planted - count.caught} not {count.expected}, but {fates}")
    pairs, captions = planted.duplicates, planted.captions
    if pairs.planted:
        figures = f"recall {pairs.recall:.3f}, precision {pairs.precision:.3f}"
        lines.append(f"near-duplicates: {figures}, {pairs.planted} planted pairs")
    if captions.wrong:
        lines.append(
            f"wrong captions on held-out scenes: {captions.dropped_share:.3f} of {captions.wrong} dropped, "
            f"{captions.lost_share:.3f} of {captions.good} good ones lost"
        )
    return lines
