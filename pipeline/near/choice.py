"""Which of near-duplicates stays: the greedy choice of `dedup`, and the clusters. Pure functions of arrays.

In keep order every picture stays unless it is near one that stays already. So each dropped one is itself near the one
kept in its place, and nothing chains: a - b - c with a far from c leaves a and c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Links(NamedTuple):
    """Pairs of rows: `a`, `b` int64, `cosine` float32 (NaN: not measured), `hamming` int32 (-1: not measured)."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    cosine: NDArray[np.float32]
    hamming: NDArray[np.int32]

    def equal(self) -> NDArray[np.bool_]:
        """Which tie a row to the first of those with its very hash and vector (a star; see `neighbours`)."""
        equal: NDArray[np.bool_] = (np.isnan(self.cosine) | (self.cosine == 1)) & (self.hamming <= 0)
        return equal

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Links:
        """Some of them."""
        return Links(self.a[rows], self.b[rows], self.cosine[rows], self.hamming[rows])


class Chosen(NamedTuple):
    """Per row: the row kept in its place (-1: it stays, or was not in question), and how near that one is."""

    kept: NDArray[np.int64]
    cosine: NDArray[np.float32]
    hamming: NDArray[np.int32]


def keep_order(
    short: NDArray[np.int32], long: NDArray[np.int32], similarity: NDArray[np.float32], uid: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each row's place among all: larger short side first, then long side, then similarity (NaN last), then uid."""
    worst_last = np.where(np.isnan(similarity), -np.inf, similarity)
    order = np.lexsort((uid, -worst_last, -long.astype(np.int64), -short.astype(np.int64)))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place


def choose(links: Links, near: NDArray[np.bool_], eligible: NDArray[np.bool_], place: NDArray[np.int64]) -> Chosen:
    """The greedy choice among `eligible` rows in the order of `place`; `near` says which links count.

    Rows of one hash and vector are decided together: what is near one of them is near all.
    """
    star = links.equal()
    node = np.arange(len(place))
    node[links.b[star]] = links.a[star]
    best = _best_of_nodes(node, eligible, place)
    edges = _both_ways(links.take(near & ~star & (best[links.a] >= 0) & (best[links.b] >= 0)))
    stays = _greedy(edges, best, place)
    chosen = _equal_rows(links.take(star), node, best, eligible)
    into, nearest = _nearest(edges.take(~stays[edges.a] & stays[edges.b]), best, place)
    rows = np.flatnonzero(eligible & ~stays[node])
    which = np.searchsorted(into, node[rows])
    chosen.kept[rows] = best[nearest.b[which]]
    chosen.cosine[rows], chosen.hamming[rows] = nearest.cosine[which], nearest.hamming[which]
    return chosen


def components(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of `count` rows the least row it is linked with, however many links away; -1 where it has no link."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first, label = np.unique(labels, return_index=True, return_inverse=True)
    linked = np.zeros(count, dtype=bool)
    linked[a] = linked[b] = True
    out: NDArray[np.int64] = np.where(linked, first[label], -1)
    return out


def _best_of_nodes(node: NDArray[np.int64], eligible: NDArray[np.bool_], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each node (by its first row) its eligible row that comes first, -1 where it has none or is no first row."""
    best = np.full(len(place), -1)
    rows = np.flatnonzero(eligible)
    rows = rows[np.argsort(-place[rows], kind="stable")]
    best[node[rows]] = rows  # the last one written, first in keep order, stays
    return best


def _both_ways(links: Links) -> Links:
    """Every link in both directions."""
    a, b = np.concatenate([links.a, links.b]), np.concatenate([links.b, links.a])
    return Links(a, b, np.tile(links.cosine, 2), np.tile(links.hamming, 2))


def _greedy(edges: Links, best: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which nodes stay: each that has no neighbour before it that stays."""
    stays = best >= 0
    order = np.argsort(edges.a, kind="stable")
    neighbours = edges.b[order]
    involved, starts = np.unique(edges.a[order], return_index=True)
    ends = np.append(starts[1:], len(neighbours))
    for i in np.argsort(place[best[involved]], kind="stable").tolist():
        if stays[involved[i]]:
            stays[neighbours[starts[i] : ends[i]]] = False
    return stays


def _nearest(edges: Links, best: NDArray[np.int64], place: NDArray[np.int64]) -> tuple[NDArray[np.int64], Links]:
    """Of links from nodes that go to nodes that stay: the former, rising, and each one's link to the nearest before it.

    Nearest is the greatest cosine, then the fewest bits, then first in keep order.
    """
    edges = edges.take(place[best[edges.b]] < place[best[edges.a]])
    order = np.lexsort((place[best[edges.b]], edges.hamming, -np.nan_to_num(edges.cosine), edges.a))
    into, first = np.unique(edges.a[order], return_index=True)
    return into, edges.take(order[first])


def _equal_rows(star: Links, node: NDArray[np.int64], best: NDArray[np.int64], eligible: NDArray[np.bool_]) -> Chosen:
    """A choice in which every node's best row stands for its others, equal to them, and nothing else is decided."""
    count = len(node)
    chosen = Chosen(np.full(count, -1), np.full(count, np.nan, np.float32), np.full(count, -1, np.int32))
    rows = np.flatnonzero(eligible & (best[node] != np.arange(count)))
    chosen.kept[rows] = best[node[rows]]
    if len(rows):
        chosen.cosine[rows], chosen.hamming[rows] = star.cosine[0], star.hamming[0]  # all stars are alike
    return chosen
