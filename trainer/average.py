"""The running average of a model's parameters: what is evaluated, saved and drawn with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def average_decay(largest: float, step: int) -> float:
    """Decay of the running average after `step` steps: the warm-up (1 + step) / (10 + step), at most `largest`."""
    return min(largest, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average = decay · average + (1 - decay) · parameters."""
    current = dict(model.named_parameters())
    torch._foreach_lerp_(list(average.values()), [current[name] for name in average], 1 - decay)


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters by name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
