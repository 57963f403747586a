"""Ridge regression in closed form, with as much of the ridge as suits the rows; powers of moments. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.conditions import HARDLY

if TYPE_CHECKING:
    from torch import Tensor

SHARES = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0  # of the mean eigenvalue: what λ of `ridge` may be


def ridge(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """W (D, D') of the ridge regression of outputs (N, D) on inputs (N, D'), both centred, and what is left (N, D).

    Left is what a regression without a row, and without its part in the means, leaves of it: (y - W x) / (1 - 1/N -
    xᵀ(XᵀX + λI)⁻¹x), with the W and the λ of all rows. The share of `SHARES` with the least of it, squared, is taken
    (Allen 1974, "The relationship between variable selection and data augmentation and a method for prediction"):
    few rows need much. Dimensions that hardly vary, where `Whitening` keeps a unit, are rounding and explain nothing.
    """
    x, y = inputs.double(), outputs.double()
    x = x * (x.square().mean(0) > HARDLY**2)
    gram, product = x.T @ x, x.T @ y

    def left_out(share: float) -> Tensor:
        hat = ridge_of(gram, x.T, share).T
        leverage = 1 / len(x) + (hat * x).sum(dim=1, keepdim=True)
        return (y - hat @ product) / (1 - leverage)

    tried = ((share, left_out(share)) for share in SHARES)
    share, left = min(tried, key=lambda pair: float(pair[1].square().sum()))
    return ridge_of(gram, product, share).T.float(), left.float()


def ridge_of(gram: Tensor, product: Tensor, share: float) -> Tensor:
    """(XᵀX + λI)⁻¹XᵀY (D', D) of XᵀX (D', D') and XᵀY, in float64: the map that minimises Σ|y - x W|² + λ|W|².

    λ is `share` of the mean eigenvalue of XᵀX (Hoerl and Kennard 1970).
    """
    size = len(gram)
    more = share * float(gram.trace()) / size or 1.0  # inputs that are all the same explain nothing: W = 0
    solved: Tensor = torch.linalg.solve(gram + more * torch.eye(size, dtype=gram.dtype, device=gram.device), product)
    return solved


def power(moment: Tensor, exponent: float) -> Tensor:
    """A power (D, D) of a symmetric matrix (D, D) without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    powers: Tensor = (vectors * values.clamp_min(0) ** exponent) @ vectors.T
    return powers
