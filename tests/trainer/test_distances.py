"""Distances between sets of vectors: closed forms, known answers, and no dependence on batches."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.distances import cmmd, frechet, kernel_distance, nearest


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def rows() -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32))


def with_moments(seed: int, mean: np.ndarray, covariance: np.ndarray, count: int = 400) -> np.ndarray:
    """Rows whose mean and unbiased covariance are exactly these."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_equal_sets_are_no_distance_apart(rows: np.ndarray) -> None:
    assert frechet(rows, rows[::-1]) == pytest.approx(0, abs=1e-12)
    assert cmmd(rows, rows[::-1]) == pytest.approx(0, abs=1e-9)
    cubic = (1 + rows.astype(float) @ rows.T) ** 3
    among = (cubic.sum() - np.trace(cubic)) / (300 * 299)
    assert kernel_distance(rows, rows) == pytest.approx(2 * among - 2 * cubic.mean(), abs=1e-12)


def test_frechet_of_known_gaussians() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    shift = rng.normal(size=5)
    a = with_moments(2, np.zeros(5), basis @ np.diag(first) @ basis.T)
    b = with_moments(3, shift, basis @ np.diag(second) @ basis.T)
    # covariances that commute: |μ|² + Σ(√a - √b)²
    expected = (shift**2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(4)
    x, y = (np.cov(rng.normal(size=(4, 30)) * rng.uniform(0.5, 2, (4, 1))) for _ in range(2))
    expected = np.trace(x + y - 2 * np.real(sqrtm(x @ y)))
    a, b = with_moments(5, np.zeros(4), x), with_moments(6, np.zeros(4), y)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_rows_than_dimensions() -> None:
    rows = np.random.default_rng(7).normal(size=(8, 40))
    assert frechet(rows, rows) == pytest.approx(0, abs=1e-10)
    assert frechet(rows, rows + 2) == pytest.approx(40 * 4)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(8)

    def draw(shift: float) -> np.ndarray:
        return unit(rng.normal(size=(60, 6)) + shift)

    same = [kernel_distance(draw(0.3), draw(0.3)) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert min(same) < 0
    assert kernel_distance(draw(0), draw(0.5)) > 5 * np.std(same)


def test_two_points_by_hand() -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert kernel_distance(a, b) == pytest.approx(8 + 8 - 2)
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)))


def test_a_figure_does_not_depend_on_batches(rows: np.ndarray) -> None:
    other = unit(np.random.default_rng(9).normal(size=(211, 12)).astype(np.float32) + 0.2)
    for measure in (kernel_distance, cmmd):
        whole = measure(rows, other)
        for block in (1, 7, 300):
            assert measure(rows, other, block) == pytest.approx(whole, rel=1e-12, abs=1e-12)
        assert measure(rows[::-1], other) == pytest.approx(whole, rel=1e-11)
    cosines, where = nearest(rows, other, np.arange(len(other)))
    for block in (1, 10):
        again = nearest(rows, other, np.arange(len(other)), block)
        np.testing.assert_allclose(again[0], cosines, atol=1e-6)
        assert (again[1] == where).all()


def test_sums_are_in_float64() -> None:
    """Half-precision rows far from the origin: in float32 the small distance would drown."""
    rng = np.random.default_rng(10)
    rows = (1000 + rng.integers(0, 8, size=(500, 4))).astype(np.float16)
    moved = rows.astype(np.float64) + 1e-4
    assert frechet(rows, moved) == pytest.approx(4e-8, rel=1e-3)


def test_nearest() -> None:
    keys = np.eye(3, dtype=np.float16)
    queries = np.array([[0, 0.6, 0.8], [1, 0, 0]], np.float32)
    cosine, where = nearest(queries, keys, np.arange(3))
    np.testing.assert_allclose(cosine, [0.8, 1.0], atol=1e-6)
    assert where.tolist() == [2, 0]
    cosine, where = nearest(queries, keys, np.array([0, 1]))  # only these are looked at
    np.testing.assert_allclose(cosine, [0.6, 1.0], atol=1e-6)
    assert where.tolist() == [1, 0]
