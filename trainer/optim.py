"""The optimizer of short runs: Muon for matrices, AdamW for the rest, as one object with one state.

Muon steps along the orthogonal factor of a matrix's momentum (Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks"), by Newton-Schulz iteration, scaled to the step size that AdamW would take (Liu et al.
2025, "Muon is scalable for LLM training", equation 4), so that one learning rate and one decay serve both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from trainer.speed import half_precision

if TYPE_CHECKING:
    from torch import Tensor

Decay = Literal["cosine", "linear"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, from the first source
ITERATIONS = 5
ADAMW_NAMES = (
    "embedding",
    "attnpool",
)  # tables of rows, and kernels too square for their use to pay the iteration
MUON_STEP = 0.6  # root mean square of a step per unit of rate (AdamW's is about 0.2)


def share_of_rate(step: int, warmup: int, steps: int, decay: Decay = "cosine", hold: int = 0) -> float:
    """Share of the peak rates: linear warm-up, the peak until step `hold`, then half a cosine or a straight line."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold)
    way = max(0, step - start) / max(1, steps - start)
    return 1 - way if decay == "linear" else 0.5 * (1 + math.cos(math.pi * way))


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factors U·Vᵀ of matrices (N, R, C): their singular values become 0.7 to 1.2.

    In bfloat16, but for CPUs that have no such product in hardware: there it takes ten times as long and more.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.bfloat16() if half_precision(x.device) else x.float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    factors: Tensor = x if wide else x.mT
    return factors


class MuonAdamW(torch.optim.Optimizer):
    """Two kinds of parameter groups: `muon` (two or more axes, flattened to output × the rest) and plain AdamW."""

    def __init__(self, groups: Sequence[dict[str, object]], beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        del closure
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            gradients = [parameter.grad for parameter in parameters]
            states = [self.state[parameter] for parameter in parameters]
            updates = (_muon if group["muon"] else _adam)(gradients, states, group)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _muon(gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, float]) -> list[Tensor]:
    """Matrices of one shape are made orthogonal together: many small products, one by one, take longer."""
    flat: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
    for number, (gradient, state) in enumerate(zip(gradients, states, strict=True)):
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - group["beta1"])
        ahead = gradient.lerp(momentum, group["beta1"]).flatten(1)  # Nesterov's
        flat[ahead.shape].append((number, ahead))
    updates = list(gradients)
    for shape, alike in flat.items():
        steps = orthogonal(torch.stack([ahead for _, ahead in alike])).to(gradients[0].dtype)
        for (number, _), step in zip(alike, steps * (MUON_STEP * max(shape) ** 0.5), strict=True):
            updates[number] = step.reshape(gradients[number].shape)
    return updates


def _adam(gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, float]) -> list[Tensor]:
    """All parameters of a group at once: on a GPU, launching kernels for each takes longer than their work."""
    for gradient, state in zip(gradients, states, strict=True):
        if not state:
            state |= {
                "step": torch.zeros(()),
                "first": torch.zeros_like(gradient),
                "second": torch.zeros_like(gradient),
            }
        state["step"] += 1
    first, second = [state["first"] for state in states], [state["second"] for state in states]
    done = [float(state["step"]) for state in states]
    torch._foreach_lerp_(first, gradients, 1 - group["beta1"])
    torch._foreach_mul_(second, group["beta2"])
    torch._foreach_addcmul_(second, gradients, gradients, 1 - group["beta2"])
    scale = torch._foreach_div(second, [1 - group["beta2"] ** n for n in done])
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, 1e-8)
    updates: list[Tensor] = list(torch._foreach_div(first, [1 - group["beta1"] ** n for n in done]))
    torch._foreach_div_(updates, scale)
    return updates


def split_parameters(
    named: Mapping[str, Tensor], rate: float, matrix_rate: float, weight_decay: float
) -> list[dict[str, object]]:
    """Groups of a model's parameters by name for `MuonAdamW`, each with its `peak` rate.

    Matrices and kernels go to Muon; embeddings and vectors to AdamW, vectors and scalars not decayed.
    """
    hidden: list[Tensor] = []
    tables: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in named.items():
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
