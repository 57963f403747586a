"""Near neighbours by perceptual hash and by vector: arrays in, pairs of row numbers out. It knows no files.

FAISS proposes; what is returned was measured anew, pair by pair, in a way that does not depend on batches or threads.
Rows with equal hash and equal vector are one node of the search, tied to their first row by a star of pairs, so a
thousand copies make 999 pairs and not half a million. Small sets are searched exhaustively, large ones by inverted
lists (Jégou et al. 2011); both are seeded and run on a fixed number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

THREADS = 2  # of FAISS, whatever the machine: its sums depend on how they are split
FLAT_VECTORS = 50_000
FLAT_HASHES = 300_000
VECTOR_PROBES = 16  # lists looked at, of 4 √N; benchmarks/dedup.py measures the recall
HASH_PROBES = 64
HASH_RADIUS = 16  # beyond it, pictures that have nothing in common are too many; the vectors propose those
TRAINING = 64  # training points per list
QUERIES = 8_192
FIRST_NEIGHBOURS, MOST_NEIGHBOURS = 32, 512
SLACK = 2e-3  # what FAISS's float32 and our float16 vectors may differ by, and then some
PLAIN_BITS = 20  # a hash with fewer bits set (or fewer clear) is of a picture with next to nothing in it


class Near(NamedTuple):
    """When two pictures are near: at most `hamming` bits apart and at least `cosine`, or `far_hamming`, `far_cosine`.

    Neither measure decides where both are known: a hash knows no colour, and a CLIP may know next to nothing about a
    kind of picture. Where there are no vectors the hash decides, within `alone`; without hashes `far_cosine` does.
    """

    hamming: int
    cosine: float
    far_hamming: int
    far_cosine: float
    alone: int

    def holds(self, cosine: NDArray[np.float32] | None, hamming: NDArray[np.int32] | None) -> NDArray[np.bool_]:
        """For pairs measured by both, or by one of them (then the other is None)."""
        if cosine is None:
            assert hamming is not None
            return hamming <= self.alone
        close: NDArray[np.bool_] = cosine >= self.far_cosine
        if hamming is None:
            return close
        return (close & (hamming <= self.far_hamming)) | ((hamming <= self.hamming) & (cosine >= self.cosine))


# What is remembered, whatever the thresholds in force, and what a cluster hangs together by.
FLOOR = Near(hamming=8, cosine=0.85, far_hamming=20, far_cosine=0.96, alone=8)


@dataclass(frozen=True)
class Fingerprints:
    """What is known of N pictures: hashes, uint64 [N], and unit vectors, float16 [N, D]; one of them may be None."""

    hashes: NDArray[np.uint64] | None
    vectors: NDArray[np.float16] | None

    def __len__(self) -> int:
        known = self.hashes if self.hashes is not None else self.vectors
        assert known is not None
        return len(known)

    def take(self, rows: NDArray[np.int64]) -> Fingerprints:
        """Those of some rows."""
        return Fingerprints(
            None if self.hashes is None else self.hashes[rows], None if self.vectors is None else self.vectors[rows]
        )


class Pairs(NamedTuple):
    """Rows `a` and `b` (int64), their cosine (float32) and different bits (int32), None where not measurable."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    cosine: NDArray[np.float32] | None
    hamming: NDArray[np.int32] | None


class Found(NamedTuple):
    """Pairs, and how many rows had more near neighbours than are kept."""

    pairs: Pairs
    capped: int


def near_pairs(prints: Fingerprints, sources: NDArray[np.uint64], floor: Near) -> Found:
    """All pairs a < b down to `floor`: between nodes, and from every further row of a node to its first.

    `sources` are hashes of the source files; without vectors they tell apart pictures that a plain hash cannot.
    """
    first, node = nodes(prints, sources)
    found = between(prints.take(first), prints.take(first), floor, within=True)
    pairs = found.pairs._replace(a=first[found.pairs.a], b=first[found.pairs.b])
    more = np.flatnonzero(first[node] != np.arange(len(node)))
    one, zero = np.ones(len(more), np.float32), np.zeros(len(more), np.int32)
    a, b = np.concatenate([pairs.a, first[node[more]]]), np.concatenate([pairs.b, more])
    cosine = None if pairs.cosine is None else np.concatenate([pairs.cosine, one])
    hamming = None if pairs.hamming is None else np.concatenate([pairs.hamming, zero])
    order = np.lexsort((b, a))
    return Found(Pairs(a[order], b[order], _at(cosine, order), _at(hamming, order)), found.capped)


def nodes(prints: Fingerprints, sources: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row of each node, rising, and each row's node."""
    mixed = np.zeros(len(prints), dtype=np.uint64)
    if prints.hashes is not None:
        mixed ^= prints.hashes * np.uint64(0x9E3779B97F4A7C15)
    if prints.vectors is not None:
        mixed ^= _mixed_rows(prints.vectors)
    else:
        mixed ^= np.where(plain(prints.hashes), sources, np.uint64(0))
    _, first, node = np.unique(mixed, return_index=True, return_inverse=True)
    if prints.vectors is not None:  # 64 bits stand for a vector: where they lie, the row is a node of its own
        for rows in _slices(len(node), 1 << 16):
            differ = (prints.vectors[rows] != prints.vectors[first[node[rows]]]).any(axis=1)
            alone = np.flatnonzero(differ) + rows.start
            node[alone] = len(first) + np.arange(len(alone))
            first = np.concatenate([first, alone])
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[node]


def plain(hashes: NDArray[np.uint64] | None) -> NDArray[np.bool_]:
    """Which hashes say next to nothing: a flat picture sets one bit whatever its colour, most set half of them."""
    assert hashes is not None
    ones = np.bitwise_count(hashes)
    return (ones < PLAIN_BITS) | (ones > 64 - PLAIN_BITS)


def between(ours: Fingerprints, theirs: Fingerprints, floor: Near, within: bool) -> Found:
    """Pairs (row of ours, row of theirs) down to `floor`; `within` one set, each once and with a < b."""
    proposed, capped = [np.zeros((0, 2), dtype=np.int64)], 0
    if ours.hashes is not None and theirs.hashes is not None:
        found, capped = _by_hash(ours, theirs, floor)
        proposed.append(found)
    if ours.vectors is not None and theirs.vectors is not None:
        found, cut = _by_vector(ours.vectors, theirs.vectors, floor.far_cosine)
        proposed.append(found)
        capped += cut
    both = np.concatenate(proposed)
    if within:
        both = np.sort(both[both[:, 0] != both[:, 1]], axis=1)
    both = np.unique(both, axis=0) if len(both) else both
    return Found(_measured(ours, theirs, both[:, 0], both[:, 1], floor), capped)


def _measured(
    ours: Fingerprints, theirs: Fingerprints, a: NDArray[np.int64], b: NDArray[np.int64], floor: Near
) -> Pairs:
    """Measure proposed pairs and keep those that reach the floor."""
    cosine = hamming = None
    if ours.vectors is not None and theirs.vectors is not None:
        cosine = cosines(ours.vectors, theirs.vectors, a, b)
    if ours.hashes is not None and theirs.hashes is not None:
        hamming = np.bitwise_count(ours.hashes[a] ^ theirs.hashes[b]).astype(np.int32)
    keep = floor.holds(cosine, hamming)
    return Pairs(a[keep], b[keep], _at(cosine, keep), _at(hamming, keep))


def cosines(
    ours: NDArray[np.float16], theirs: NDArray[np.float16], a: NDArray[np.int64], b: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Cosine of each pair of stored vectors, below 1 unless they are equal, row by row whatever the batch."""
    out = np.empty(len(a), dtype=np.float32)
    for rows in _slices(len(a), 1 << 14):
        one, other = ours[a[rows]].astype(np.float64), theirs[b[rows]].astype(np.float64)
        lengths = np.sqrt(np.einsum("nd,nd->n", one, one) * np.einsum("nd,nd->n", other, other))
        value = (np.einsum("nd,nd->n", one, other) / np.maximum(lengths, 1e-12)).astype(np.float32)
        equal = (one == other).all(axis=1)
        out[rows] = np.where(equal, np.float32(1), np.minimum(value, np.nextafter(np.float32(1), np.float32(0))))
    return out


# --- proposals ------------------------------------------------------------------------------------


def _by_hash(ours: Fingerprints, theirs: Fingerprints, floor: Near) -> tuple[NDArray[np.int64], int]:
    """Pairs within the radius. Equal hashes are searched once; each row meets `MOST_NEIGHBOURS` of a hash at most."""
    assert ours.hashes is not None and theirs.hashes is not None
    alone = ours.vectors is None or theirs.vectors is None
    radius = floor.alone if alone else max(floor.hamming, min(floor.far_hamming, HASH_RADIUS))
    our_rows, their_rows = np.arange(len(ours)), np.arange(len(theirs))
    if alone:
        our_rows, their_rows = our_rows[~plain(ours.hashes)], their_rows[~plain(theirs.hashes)]
    queries, our_lists = _grouped(ours.hashes, our_rows)
    values, their_lists = _grouped(theirs.hashes, their_rows)
    if not len(queries) or not len(values):
        return np.zeros((0, 2), dtype=np.int64), 0
    index, found, capped = hash_index(values), [np.zeros((0, 2), dtype=np.int64)], 0
    for rows in _slices(len(queries), QUERIES):
        limits, _, hits = index.range_search(_bits(queries[rows]), radius + 1)  # FAISS means "less than"
        for query in np.flatnonzero(np.diff(limits)):
            left = our_lists[rows.start + query]
            right = np.concatenate([their_lists[hit] for hit in np.sort(hits[limits[query] : limits[query + 1]])])
            capped += len(left) if len(right) > MOST_NEIGHBOURS else 0
            right = right[:MOST_NEIGHBOURS]
            found.append(np.stack([np.repeat(left, len(right)), np.tile(right, len(left))], axis=1))
    return np.concatenate(found), capped


def _grouped(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], list[NDArray[np.int64]]]:
    """The different hashes, rising, and for each the rows that have it."""
    order = rows[np.argsort(hashes[rows], kind="stable")]
    values, starts = np.unique(hashes[order], return_index=True)
    return values, np.split(order, starts[1:])


def _by_vector(ours: NDArray[np.float16], theirs: NDArray[np.float16], least: float) -> tuple[NDArray[np.int64], int]:
    """Pairs at or above a cosine; a row whose neighbours do not fit is asked again for more, up to a cap."""
    if not len(ours) or not len(theirs):
        return np.zeros((0, 2), dtype=np.int64), 0
    index, found, again = vector_index(theirs), [np.zeros((0, 2), dtype=np.int64)], np.arange(len(ours))
    for count in (min(size, len(theirs)) for size in (FIRST_NEIGHBOURS, MOST_NEIGHBOURS)):
        full: list[NDArray[np.int64]] = []
        for rows in _slices(len(again), QUERIES if count <= FIRST_NEIGHBOURS else QUERIES // 16):
            scores, hits = index.search(np.ascontiguousarray(ours[again[rows]], dtype=np.float32), count)
            near = (scores >= least - SLACK) & (hits >= 0)
            query, place = np.nonzero(near)
            found.append(np.stack([again[rows][query], hits[query, place]], axis=1))
            full.append(again[rows][near[:, -1]])
        again = np.concatenate(full)
        if count == len(theirs) or not len(again):
            return np.concatenate(found), 0
    return np.concatenate(found), len(again)


def vector_index(vectors: NDArray[np.float16]) -> Any:
    """A FAISS index of inner products: flat for small sets, inverted lists of float16 for large ones."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    count, dimension = vectors.shape
    if count <= FLAT_VECTORS:
        index: Any = faiss.IndexFlatIP(dimension)
    else:
        lists = int(4 * count**0.5)
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dimension), dimension, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.cp.niter, index.nprobe = 0, 5, VECTOR_PROBES
        sample = np.sort(np.random.default_rng(0).permutation(count)[: lists * TRAINING])
        index.train(vectors[sample].astype(np.float32))
    for rows in _slices(count, 1 << 16):
        index.add(vectors[rows].astype(np.float32))
    return index


def hash_index(hashes: NDArray[np.uint64]) -> Any:
    """A FAISS binary index of 64-bit hashes: flat for small sets, inverted lists for large ones."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    if len(hashes) <= FLAT_HASHES:
        index: Any = faiss.IndexBinaryFlat(64)
    else:
        lists = int(2 * len(hashes) ** 0.5)
        index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(64), 64, lists)
        index.cp.seed, index.cp.niter, index.nprobe = 0, 5, HASH_PROBES
        sample = np.sort(np.random.default_rng(0).permutation(len(hashes))[: lists * TRAINING])
        index.train(_bits(hashes[sample]))
    index.add(_bits(hashes))
    return index


def _bits(hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)


def _mixed_rows(vectors: NDArray[np.float16]) -> NDArray[np.uint64]:
    """64 bits per row that are equal where the rows are: a random linear form of their bytes, modulo 2^64."""
    factors = np.random.default_rng(0).integers(0, 2**63, vectors.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    out = np.empty(len(vectors), dtype=np.uint64)
    for rows in _slices(len(vectors), 1 << 14):
        block = np.ascontiguousarray(vectors[rows]).view(np.uint16).astype(np.uint64)
        out[rows] = (block * factors).sum(axis=1, dtype=np.uint64)
    return out


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _at(values: Any, rows: Any) -> Any:
    return None if values is None else values[rows]
