"""What `filter` decides over all rows at once: pure functions of arrays with one entry per raw row.

A row's failed rules are the bits of a number (see `rules.bit`), its reason before any rule an index into a vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.fates import KEPT, RULES, SUPERSEDED
from pipeline.verdict.rules import bit

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdicts:
    """The raw rows: `base`, an index into `vocabulary` (0: has a picture and counts), and `bits`, the failed rules."""

    vocabulary: list[str]  # its first two entries are "" and SUPERSEDED
    base: NDArray[np.int32]
    bits: NDArray[np.uint32]

    def columns(self, rows: slice) -> tuple[pa.Array, pa.Array]:
        """`reason` (string, NULL = keep) and `fails` (list of strings) of some rows."""
        import pyarrow as pa

        kinds, inverse = np.unique(self.bits[rows], return_inverse=True)
        lists = [[rule for rule in RULES if int(kind) & bit(rule)] for kind in kinds]
        first = [f"filter:{rules[0]}" if rules else None for rules in lists]
        base = self.base[rows]
        codes = np.where(base > 0, base, inverse + len(self.vocabulary))
        reasons = pa.array([*self.vocabulary, *first], pa.string())
        return reasons.take(pa.array(codes)), pa.array(lists, pa.list_(pa.string())).take(pa.array(inverse))

    def fates(self) -> Counter[str]:
        """How many rows have each reason; those kept under `kept`."""
        fates = Counter[str]()
        for code, rows in zip(*np.unique(self.base, return_counts=True), strict=True):
            if code:
                fates[self.vocabulary[code]] += int(rows)
        for kind, rows in zip(*np.unique(self.bits[self.base == 0], return_counts=True), strict=True):
            rule = next((rule for rule in RULES if int(kind) & bit(rule)), None)
            fates[f"filter:{rule}" if rule else KEPT] += int(rows)
        return fates


def vocabulary() -> list[str]:
    """The start of a `Verdicts.vocabulary`."""
    return ["", SUPERSEDED]


def superseded(uids: NDArray[np.uint64], fetched: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows do not count: all of a uid but its latest fetched row, or its latest row where none was fetched."""
    out = np.zeros(len(uids), dtype=bool)
    ordered = np.sort(uids)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    rows = np.flatnonzero(np.isin(uids, repeated)) if len(repeated) else np.zeros(0, dtype=np.int64)
    order = rows[np.lexsort((rows, fetched[rows], uids[rows]))]  # of each uid, the row that counts comes last
    out[order[:-1][uids[order[:-1]] == uids[order[1:]]]] = True
    return out


def crowded(
    captions: NDArray[np.uint64], pictures: NDArray[np.uint64], counts: NDArray[np.bool_], limit: int
) -> NDArray[np.bool_]:
    """Which of the rows that count have a caption that more than `limit` different pictures share (all by hash)."""
    factor = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: an odd multiplier that mixes the high bits
    with np.errstate(over="ignore"):
        pairs = captions[counts] * factor ^ pictures[counts]
    _, first = np.unique(pairs, return_index=True)
    values, pictures_each = np.unique(captions[counts][first], return_counts=True)
    out: NDArray[np.bool_] = counts & np.isin(captions, values[pictures_each > limit])
    return out


def least_of_best(values: NDArray[np.float32], fraction: float) -> float:
    """The smallest value among the best `fraction` (rounded up) of `values`; NaN counts as the worst."""
    if not len(values):
        return float("inf")
    best = -(-len(values) * fraction // 1)
    ranked = np.where(np.isnan(values), -np.inf, values)
    position = len(values) - max(1, min(len(values), int(best)))
    return float(np.partition(ranked, position)[position])
