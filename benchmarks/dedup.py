"""How many near-duplicate pairs the large indexes find of those that exhaustive search finds, and how long both take.

    python -m benchmarks.dedup [ROWS ...]

Vectors lie around centres, as those of pictures do, and one row in ten is a near-copy of another: 0 to 16 bits of its
hash differ, and its cosine is 0.96 or more. For each number of rows (default 20,000 and 100,000) both indexes are used
whatever their size, and the greedy choice is timed on the pairs found.
"""

from __future__ import annotations

import sys
import time
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from pipeline.near import neighbours
from pipeline.near.choice import Links, choose
from pipeline.near.neighbours import FLOOR, Fingerprints, near_pairs

DIMENSION = 256
CENTRES = 500


def pictures(rows: int) -> Fingerprints:
    """Random fingerprints with planted near-copies, the same in every run."""
    rng = np.random.default_rng(0)
    originals = rows * 9 // 10
    centres = rng.normal(size=(CENTRES, DIMENSION)).astype(np.float32)
    vectors = centres[rng.integers(0, CENTRES, rows)] + 0.7 * rng.normal(size=(rows, DIMENSION)).astype(np.float32)
    hashes = rng.integers(0, 2**63, rows, dtype=np.uint64)
    source = rng.integers(0, originals, rows - originals)
    spread = rng.uniform(0, 0.28, (rows - originals, 1)).astype(np.float32)
    noise = rng.normal(size=(rows - originals, DIMENSION)).astype(np.float32)
    length = np.linalg.norm(vectors[source], axis=1, keepdims=True) / DIMENSION**0.5
    vectors[originals:] = vectors[source] + spread * length * noise
    hashes[originals:] = flipped(hashes[source], rng)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Fingerprints(hashes, vectors.astype(np.float16))


def flipped(hashes: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.uint64]:
    """Hashes with 0 to 16 of their bits changed."""
    order = np.argsort(rng.random((len(hashes), 64)), axis=1)
    chosen = order < rng.integers(0, 17, len(hashes))[:, None]
    return hashes ^ (chosen.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)


def measure(prints: Fingerprints, flat: bool) -> tuple[set[tuple[int, int]], float]:
    """All pairs down to the floor by one kind of index, and the seconds it took."""
    started, limit = time.monotonic(), 2**31 if flat else 0
    with mock.patch.multiple(neighbours, FLAT_VECTORS=limit, FLAT_HASHES=limit):
        found = near_pairs(prints, np.arange(len(prints), dtype=np.uint64), FLOOR).pairs
    return set(zip(found.a.tolist(), found.b.tolist(), strict=True)), time.monotonic() - started


def choice_seconds(prints: Fingerprints) -> float:
    """How long the greedy choice takes once the pairs are known."""
    found = near_pairs(prints, np.arange(len(prints), dtype=np.uint64), FLOOR).pairs
    assert found.cosine is not None and found.hamming is not None
    started = time.monotonic()
    every = np.ones(len(found.a), dtype=bool)
    choose(
        Links(*found[:2], found.cosine, found.hamming), every, np.ones(len(prints), dtype=bool), np.arange(len(prints))
    )
    return time.monotonic() - started


def main(sizes: list[int]) -> None:
    for rows in sizes:
        both = pictures(rows)
        parts = {"vectors": Fingerprints(None, both.vectors), "hashes": Fingerprints(both.hashes, None), "both": both}
        for name, prints in parts.items():
            (exact, slow), (lists, fast) = measure(prints, flat=True), measure(prints, flat=False)
            recall = len(exact & lists) / max(len(exact), 1)
            times = f"exhaustive {slow:>6.1f} s, inverted lists {fast:>6.1f} s"
            print(f"{rows:>10,} rows, {name:<8}{len(exact):>9,} pairs: {times}, recall {recall:.4f}", flush=True)
        print(f"{rows:>10,} rows, the choice from the pairs: {choice_seconds(both):.2f} s", flush=True)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [20_000, 100_000])
