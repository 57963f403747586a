"""Ridge regression against its formula, and against fitting it anew without each row."""

from __future__ import annotations

import pytest
import torch

from trainer.ridge import SHARES, ridge, ridge_of


def test_ridge_of_inputs_that_are_all_the_same_answers_the_mean() -> None:
    outputs = torch.randn((6, 3), generator=torch.Generator().manual_seed(0))
    inputs = torch.randn((6, 4), generator=torch.Generator().manual_seed(1))
    for same in (torch.zeros(6, 4), 1e-5 * inputs):
        weight, left = ridge(same, outputs)
        assert not weight.any()
        torch.testing.assert_close(left, outputs / (1 - 1 / 6))  # of the mean of the others, where outputs are centred
    assert bool(ridge(inputs, outputs)[0].any())


def test_ridge_finds_a_linear_map_and_shrinks_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(400, 6, generator=generator).double(), torch.randn(5, 6, generator=generator).double()
    gram, product = x.T @ x, x.T @ (x @ true.T)
    torch.testing.assert_close(ridge_of(gram, product, 1e-9).T, true, atol=1e-5, rtol=1e-5)
    expected = torch.linalg.inv(gram + 0.5 * gram.trace() / 6 * torch.eye(6)) @ product
    torch.testing.assert_close(ridge_of(gram, product, 0.5), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ridge(x, x @ true.T)[0], ridge_of(gram, product, 1e-3).T.float())


@pytest.mark.parametrize(("rows", "told"), [(40, 1.0), (20, 0.3), (8, 0.3), (3, 0.0)])
def test_what_is_left_of_a_row_is_what_a_regression_without_it_leaves_and_the_best_share_is_taken(
    rows: int, told: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(rows, 12, generator=generator).double(), torch.randn(rows, 5, generator=generator).double()
    y = told * x[:, :5] + noise
    x, y = x - x.mean(0), y - y.mean(0)
    by_share = {}
    for share in SHARES:
        lam, left = share * x.square().sum() / 12, torch.empty_like(y)
        for row in range(rows):
            others = torch.arange(rows) != row
            x_mean, y_mean = x[others].mean(0), y[others].mean(0)
            a, b = x[others] - x_mean, y[others] - y_mean
            weight = torch.linalg.solve(a.T @ a + lam * torch.eye(12), a.T @ b)
            left[row] = y[row] - y_mean - (x[row] - x_mean) @ weight
        by_share[share] = left
    best = min(by_share, key=lambda share: float(by_share[share].square().sum()))
    weight, left = ridge(x, y)
    torch.testing.assert_close(left, by_share[best].float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight, ridge_of(x.T @ x, x.T @ y, best).T.float())
