"""Figures of a report: for every signal how the kept and the dropped lie, as heights of bars and places of lines.

Numbers in, numbers out: fractions of a chart's width and height. It knows nothing of HTML, files or rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.base import visible

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

BINS = 48
TAIL = 0.005  # of the rows at either end lie in the first and last bar
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
LABELS = 10
LABEL = 40  # characters of one


@dataclass(frozen=True)
class Bar:
    """A bar: `left` and `width` in [0, 1] of the chart, heights `kept` and `dropped` in [0, 1], stacked."""

    left: float
    width: float
    kept: float
    dropped: float
    title: str


@dataclass(frozen=True)
class Limit:
    """A threshold: its text, its place in [0, 1], and how many rows that have a picture it passes, in [0, 1]."""

    text: str
    place: float
    passes: float


@dataclass(frozen=True)
class Chart:
    """One signal. Of `bars` (a histogram) and `labels` (text, kept share, dropped share, rows) one is empty."""

    name: str
    signal: str
    bars: Sequence[Bar]
    axis: tuple[str, str, str]
    labels: Sequence[tuple[str, float, float, float]]
    quantiles: Sequence[tuple[str, str]]
    missing: float
    limit: Limit | None


def chart(
    name: str,
    signal: str,
    column: pa.ChunkedArray,
    kept: NDArray[np.bool_],
    weights: NDArray[np.float64],
    limit: tuple[str, float] | None = None,
) -> Chart | None:
    """The chart of a column of numbers, flags or labels; None where it holds nothing.

    `kept` (rows,) and `weights` (rows,), how many rows each stands for. `limit` is a threshold: a sign `≥` or `≤` that
    a row must meet, and the number.
    """
    import pyarrow as pa

    kind, present = column.type, ~column.is_null().to_numpy()
    if not (weights[present] > 0).any():
        return None
    missing = 1 - float(weights[present].sum() / weights.sum())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _number_chart(name, signal, _floats(column), pa.types.is_integer(kind), kept, weights, missing, limit)
    values = [
        ("yes" if value else "no") if isinstance(value, bool) else visible(str(value), LABEL)
        for value in column.to_pylist()
    ]
    return _label_chart(
        name, signal, [v for v, p in zip(values, present, strict=True) if p], kept[present], weights[present], missing
    )


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Numbers as float64, NaN where null."""
    import numpy as np
    import pyarrow as pa

    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _number_chart(
    name: str,
    signal: str,
    values: NDArray[np.float64],
    whole: bool,
    kept: NDArray[np.bool_],
    weights: NDArray[np.float64],
    missing: float,
    limit: tuple[str, float] | None,
) -> Chart | None:
    import numpy as np

    finite = np.isfinite(values) & (weights > 0)
    if not finite.any():
        return None
    values, kept, weights = values[finite], kept[finite], weights[finite]
    edges, step = _edges(values, whole, weights, limit[1] if limit else None)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    sums = (np.bincount(place[part], weights[part], len(edges) - 1).astype(np.float64) for part in (kept, ~kept))
    bars = _bars(edges, step, *sums)
    quantiles = [(_percent_name(q), figure(weighted_quantile(values, weights, q))) for q in QUANTILES]
    low, high = float(edges[0]), float(edges[-1])
    line = None
    if limit:
        sign, number = limit
        passing = values >= number if sign == "≥" else values <= number
        between = number + (-step / 2 if sign == "≥" else step / 2)
        line = Limit(
            f"{sign} {figure(number)}", (between - low) / (high - low), float(weights[passing].sum() / weights.sum())
        )
    axis = (figure(low + step / 2), figure((low + high) / 2), figure(high - step / 2))
    return Chart(name, signal, bars, axis, (), quantiles, missing, line)


def _bars(edges: NDArray[np.float64], step: int, kept: NDArray[np.float64], dropped: NDArray[np.float64]) -> list[Bar]:
    top, width = float((kept + dropped).max()), 1 / len(kept)
    bars = []
    for i, (stays, goes) in enumerate(zip(kept.tolist(), dropped.tolist(), strict=True)):
        span = figure(edges[i] + 0.5) if step else f"{figure(edges[i])} to {figure(edges[i + 1])}"
        bars.append(Bar(i * width, width, stays / top, goes / top, f"{span}: {stays:,.0f} kept, {goes:,.0f} dropped"))
    return bars


def _edges(
    values: NDArray[np.float64], whole: bool, weights: NDArray[np.float64], limit: float | None
) -> tuple[NDArray[np.float64], int]:
    """Bin edges over all but the tails, the threshold inside; and 1 where each whole number has a bin, else 0."""
    import numpy as np

    low, high = (weighted_quantile(values, weights, q) for q in (TAIL, 1 - TAIL))
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    if whole and high - low < BINS:
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5, 1
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1), 0


def weighted_quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    """The least value with at least the share `q` of the weight at or below it (inverse of the weighted CDF)."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weights[order])
    return float(values[order][min(int(np.searchsorted(mass, q * mass[-1])), len(values) - 1)])


def _label_chart(
    name: str, signal: str, values: Sequence[str], kept: NDArray[np.bool_], weights: NDArray[np.float64], missing: float
) -> Chart:
    rows: dict[str, list[float]] = {}
    for value, stays, weight in zip(values, kept, weights, strict=True):
        rows.setdefault(value, [0.0, 0.0])[0 if stays else 1] += float(weight)
    ranked = sorted(rows, key=lambda value: (-sum(rows[value]), value))
    if len(ranked) > LABELS:
        other = [sum(rows[value][i] for value in ranked[LABELS - 1 :]) for i in (0, 1)]
        ranked, rows = [*ranked[: LABELS - 1], "all others"], rows | {"all others": other}
    top = max(sum(rows[value]) for value in ranked)
    labels = [(value, rows[value][0] / top, rows[value][1] / top, sum(rows[value])) for value in ranked]
    return Chart(name, signal, (), ("", "", ""), labels, (), missing, None)


def figure(value: Any) -> str:
    """A number as a person reads it: three or so figures, thousands apart."""
    number = float(value)
    if 0 < abs(number) < 0.001:
        return "<0.001" if number > 0 else ">-0.001"
    if number == round(number) or abs(number) >= 1000:
        return f"{round(number):,}"
    if abs(number) < 0.1:
        return f"{number:.3f}".rstrip("0")
    return f"{number:.1f}" if abs(number) >= 100 else f"{number:.3g}"


def _percent_name(q: float) -> str:
    return "median" if q == 0.5 else f"{q:.0%}"
