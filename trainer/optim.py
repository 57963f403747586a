"""The optimizer of short runs: Muon for matrices, AdamW for the rest, as one object with one state.

Muon steps along the orthogonal factor of a matrix's momentum (Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks"), by Newton-Schulz iteration, scaled to the step size that AdamW would take (Liu et al.
2025, "Muon is scalable for LLM training", equation 4), so that one learning rate and one decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trainer.speed import half_precision

if TYPE_CHECKING:
    from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the first source
ITERATIONS = 5
ADAMW_NAMES = (
    "embedding",
    "attnpool",
)  # tables of rows, and kernels too square for their use to pay the iteration
MUON_STEP = 0.6  # root mean square of a step per unit of rate (AdamW's is about 0.2)


def share_of_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak rates: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor U·Vᵀ of a matrix (R, C): its singular values become 0.7 to 1.2.

    In bfloat16, but for CPUs that have no such product in hardware: there it takes ten times as long and more.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x.bfloat16() if half_precision(x.device) else x.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    factor: Tensor = x if wide else x.T
    return factor


class MuonAdamW(torch.optim.Optimizer):
    """Two kinds of parameter groups: `muon` (two or more axes, flattened to output × the rest) and plain AdamW."""

    def __init__(self, groups: Sequence[dict[str, object]], beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[parameter]
                update = _muon(parameter.grad, state, group) if group["muon"] else _adam(parameter.grad, state, group)
                parameter.add_(update, alpha=-group["lr"])


def _muon(gradient: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> Tensor:
    momentum = state.setdefault("momentum", torch.zeros_like(gradient))
    momentum.lerp_(gradient, 1 - group["beta1"])
    ahead = gradient.lerp(momentum, group["beta1"])  # Nesterov's
    flat = ahead.flatten(1)
    step = orthogonal(flat).to(gradient.dtype) * (MUON_STEP * max(flat.shape) ** 0.5)
    update: Tensor = step.reshape(gradient.shape)
    return update


def _adam(gradient: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> Tensor:
    count = state.setdefault("step", torch.zeros(()))
    first = state.setdefault("first", torch.zeros_like(gradient))
    second = state.setdefault("second", torch.zeros_like(gradient))
    count.add_(1)
    first.lerp_(gradient, 1 - group["beta1"])
    second.mul_(group["beta2"]).addcmul_(gradient, gradient, value=1 - group["beta2"])
    done = float(count)
    scale = (second / (1 - group["beta2"] ** done)).sqrt_().add_(1e-8)
    update: Tensor = first / (1 - group["beta1"] ** done) / scale
    return update


def split_parameters(model: nn.Module, rate: float, matrix_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Groups for `MuonAdamW`, each with its `peak` rate.

    Matrices and kernels go to Muon; embeddings and vectors to AdamW, vectors and scalars not decayed.
    """
    hidden: list[Tensor] = []
    tables: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            rest.append(parameter)
        elif any(part in name for part in ADAMW_NAMES):
            tables.append(parameter)
        else:
            hidden.append(parameter)
    return [
        {"params": hidden, "peak": matrix_rate, "weight_decay": weight_decay, "muon": True},
        {"params": tables, "peak": rate, "weight_decay": weight_decay},
        {"params": rest, "peak": rate, "weight_decay": 0.0},
    ]
