"""Distances between two sets of vectors: Fréchet, kernel, CMMD; and nearest neighbours. Arrays in, numbers out.

All sums are float64, so a figure does not depend on how the rows were batched. In a CLIP's space these are not FID and
KID, which are of Inception's features, and must not be called so. This module knows nothing of pictures or CLIPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.floating[Any]]  # (N, D)
    Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # products x·y of unit rows => kernel values

BLOCK = 2048  # rows whose products are held at a time
CMMD_WIDTH = 10.0  # of the Gaussian kernel; Jayasumana et al. 2024, section 4
CMMD_SCALE = 1000.0


def frechet(a: Rows, b: Rows) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2(Σa Σb)^½) of rows (N, D) and (M, D), at least two each.

    Dowson and Landau 1982, equation 16. With Σ = RᵀR the trace of the root is the sum of the singular values of Ra·Rbᵀ,
    so no root of a badly conditioned product is taken. With few rows it is biased upwards: compare equal numbers.
    """
    mean_a, root_a = _moments(a)
    mean_b, root_b = _moments(b)
    shift = float(np.square(mean_a - mean_b).sum())
    spread = float(np.square(root_a).sum() + np.square(root_b).sum())
    overlap = float(np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum())
    return max(0.0, shift + spread - 2 * overlap)


def _moments(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and R with RᵀR the unbiased covariance."""
    values = np.asarray(rows, dtype=np.float64)
    mean = values.mean(axis=0)
    root: NDArray[np.float64] = np.asarray(np.linalg.qr(values - mean, mode="r"))
    return mean, root / math.sqrt(len(values) - 1)


def kernel_distance(a: Rows, b: Rows, block: int = BLOCK) -> float:
    """Unbiased squared MMD of unit rows with the kernel (1 + x·y)³; about 0, also below, for one distribution.

    Gretton et al. 2012, equation 3; the cubic kernel of Bińkowski et al. 2018, section 4, over all rows at once.
    """

    def cubic(products: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((1 + products) ** 3)

    return _within(a, cubic, block) + _within(b, cubic, block) - 2 * _mean(a, b, cubic, block)


def cmmd(a: Rows, b: Rows, block: int = BLOCK) -> float:
    """1000 times the squared MMD of unit rows with a Gaussian kernel of width 10; 0 for equal sets, never below.

    Jayasumana et al. 2024, equation 4 and section 4, as published over all pairs.
    """

    def gaussian(products: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.exp((products - 1) / CMMD_WIDTH**2))  # |x - y|² = 2 - 2x·y

    pairs = _mean(a, a, gaussian, block) + _mean(b, b, gaussian, block) - 2 * _mean(a, b, gaussian, block)
    return CMMD_SCALE * max(0.0, pairs)


def _mean(a: Rows, b: Rows, kernel: Kernel, block: int) -> float:
    return _sum(a, b, kernel, block) / (len(a) * len(b))


def _within(rows: Rows, kernel: Kernel, block: int) -> float:
    """Mean over the pairs of two different rows."""
    values = np.asarray(rows, dtype=np.float64)
    own = math.fsum(kernel(np.square(values).sum(axis=1)).tolist())
    return (_sum(rows, rows, kernel, block) - own) / (len(rows) * (len(rows) - 1))


def _sum(a: Rows, b: Rows, kernel: Kernel, block: int) -> float:
    other = np.asarray(b, dtype=np.float64).T
    starts = range(0, len(a), block)
    return math.fsum(float(kernel(np.asarray(a[s : s + block], dtype=np.float64) @ other).sum()) for s in starts)


def nearest(
    queries: Rows, keys: Rows, rows: NDArray[np.int64], block: int = 1 << 16
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosine and number of the key nearest to each query (N, D), all unit vectors; the first where equal.

    Of the keys (M, D), which may lie on the disk, `rows` are looked at, some at a time.
    """
    best = np.full(len(queries), -np.inf, np.float32)
    where = np.zeros(len(queries), np.int64)
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        products = np.asarray(queries, np.float32) @ np.asarray(keys[some], np.float32).T
        own = products.argmax(axis=1)
        value = products[np.arange(len(products)), own]
        closer = value > best
        best, where = np.where(closer, value, best), np.where(closer, some[own], where)
    return best, where
