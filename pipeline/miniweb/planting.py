"""The plan of a mini-web: every row of its list with the fault planted in it, and the answer at every URL. Pure."""

from dataclasses import replace

from pipeline.base import HeadraceError
from pipeline.miniweb.content import generator
from pipeline.miniweb.faults import BY_NAME, CLEAN, counts
from pipeline.miniweb.planters import COPIES, PLANTERS, copy
from pipeline.miniweb.rows import Maker, PlannedUrl

HELD_OUT_EVERY = 8  # of the clean rows of a list with faults one in so many shows a held-out combination


def build(seed: int, rows: int, faults: bool) -> list[PlannedUrl]:
    """The list's rows in order; equal arguments give equal rows. Clean scenes alone without `faults`.

    Raises:
        HeadraceError: for fewer rows than the faults need.
    """
    maker = Maker(seed, unique=faults)
    if not faults:
        return [maker.row(held=None) for _ in range(rows)]
    wanted = counts(rows)
    clean = rows - sum(wanted.values())
    if clean < sum(wanted.values()) / 3:
        least = next(n for n in range(rows, 3000) if n >= 4 / 3 * sum(counts(n).values()))
        raise HeadraceError(f"{rows} rows are too few for every fault", hint=f"take at least {least} rows")
    plan = [maker.row(held=k % HELD_OUT_EVERY == 0) for k in range(clean)]
    originals: list[PlannedUrl] = []
    for name, number in wanted.items():
        if name == "repeated_row":
            continue
        planted = [_plant(maker, name, k, originals) for k in range(number)]
        if name == "dup_original":
            originals = planted
        plan += planted
    order = generator("order", seed).permutation(len(plan))
    plan = [plan[i] for i in order]
    same = [row for row in plan if row.fault == CLEAN][: wanted["repeated_row"]]
    again = BY_NAME["repeated_row"]
    return plan + [replace(row, fault=again.name, expected=again.expected, routes=()) for row in same]


def _plant(maker: Maker, name: str, k: int, originals: list[PlannedUrl]) -> PlannedUrl:
    if name in COPIES:
        row = copy(maker, name, originals[maker.copies % len(originals)])
        maker.copies += 1
    elif name == "dup_original":
        row = replace(maker.row(side=240, quality=92), group=f"g{k:03d}")
    else:
        row = PLANTERS[name](maker, k)
    return replace(row, fault=name, expected=BY_NAME[name].expected)
