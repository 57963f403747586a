"""The optimizer's state as tensors."""

from __future__ import annotations

import torch
from torch import nn

from trainer.checkpoint import optimizer_tensors, restore_optimizer
from trainer.optim import MuonAdamW


class Scaled(nn.Module):
    """A scalar, as CLIP's `logit_scale`, and a kernel in channels-last order."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device))
        kernel = torch.ones(4, 3, 2, 2, device=device)
        self.kernel = nn.Parameter(kernel.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def stepped() -> tuple[Scaled, MuonAdamW]:
    model = Scaled("cpu")
    optimizer = MuonAdamW([{"params": list(model.parameters()), "lr": 0.1}], 0.9, 0.99)
    (model.scale * model.kernel.square().sum()).backward()
    optimizer.step()
    return model, optimizer


def test_moments_lie_where_their_parameter_lies_and_counts_of_steps_on_the_cpu() -> None:
    tensors = optimizer_tensors(*stepped())
    other = Scaled("meta")  # stands for a GPU: a device that is not where the tensors were read
    optimizer = MuonAdamW([{"params": list(other.parameters())}], 0.9, 0.99)
    restore_optimizer(other, optimizer, tensors)
    for parameter in other.parameters():
        state = optimizer.state[parameter]
        assert {name: state[name].device.type for name in state} == {"step": "cpu", "first": "meta", "second": "meta"}
        assert state["first"].stride() == parameter.stride()


def test_what_is_restored_equals_what_was_there() -> None:
    model, optimizer = stepped()
    tensors = {name: value.contiguous() for name, value in optimizer_tensors(model, optimizer).items()}
    other = MuonAdamW([{"params": list(model.parameters())}], 0.9, 0.99)
    restore_optimizer(model, other, tensors)
    for parameter in model.parameters():
        before, after = optimizer.state[parameter], other.state[parameter]
        assert set(before) == set(after) == {"step", "first", "second"}
        assert all(torch.equal(before[name], after[name]) for name in before) and float(after["step"]) == 1
