"""Muon and AdamW in one optimizer, against closed forms and torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.optim import MUON_STEP, Decay, MuonAdamW, orthogonal, share_of_rate, split_parameters


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(
    shape: tuple[int, int], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.optim.half_precision", lambda device: half)  # as on CPUs with bfloat16 and without
    matrices = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    factors = orthogonal(matrices * torch.tensor([1.0, 1e-3])[:, None, None])  # whatever the size of each
    assert factors.dtype == (torch.bfloat16 if half else torch.float32)
    for matrix, factor in zip(matrices, factors, strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ factor.float() @ vh.T  # diagonal, near the identity
        values = inside.diag()
        assert (values > 0.5).all() and (values < 1.4).all()
        assert (inside - values.diag()).abs().max() < 0.1


def test_plain_groups_step_as_torchs_adamw_does() -> None:
    """Two parameters of one group, the second of which has a gradient in later steps only, and one that never has."""
    start = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(2, 1, 5), torch.ones(2)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    one = MuonAdamW([{"params": ours, "lr": 0.01, "weight_decay": 0.1}], beta1=0.9, beta2=0.98)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8)
    for step in range(5):
        for many in (ours, theirs):
            many[0].grad = torch.sin(torch.arange(12.0).reshape(3, 4) + step)
            many[1].grad = torch.cos(torch.arange(5.0) * step) if step >= 2 else None
        one.step()
        other.step()
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their)
    assert torch.equal(ours[2], start[2])


def test_a_muon_step_has_the_promised_size() -> None:
    kernel = nn.Parameter(torch.zeros(16, 8, 3, 3))
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    MuonAdamW([{"params": [kernel], "lr": 0.01, "muon": True}], beta1=0.9, beta2=0.98).step()
    size = float(kernel.detach().square().mean().sqrt())
    assert size == pytest.approx(0.01 * MUON_STEP, rel=0.3)
    assert float((kernel.detach() * kernel.grad).sum()) < 0  # downhill


def test_every_parameter_is_in_one_group() -> None:
    model = nn.ModuleDict({"token_embedding": nn.Embedding(5, 3), "conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(4)})
    groups = split_parameters(dict(model.named_parameters()), 0.1, 0.2, 0.3)
    placed = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    assert len(placed) == len(list(model.parameters())) == len({id(parameter) for parameter in placed})
    assert [len(group["params"]) for group in groups] == [1, 1, 3]  # type: ignore[arg-type]
    assert groups[0]["peak"] == 0.2 and groups[0]["muon"] and groups[2]["weight_decay"] == 0.0


@pytest.mark.parametrize(("decay", "quarter"), [("cosine", 0.5 + 0.5**1.5), ("linear", 0.75)])
def test_the_rate_warms_up_and_falls_to_nothing(decay: Decay, quarter: float) -> None:
    shares = [share_of_rate(step, 20, 100, decay) for step in range(101)]
    assert shares[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert [shares[20], shares[40], shares[60], shares[100]] == pytest.approx([1, quarter, 0.5, 0])
    assert shares[19:] == sorted(shares[19:], reverse=True)


def test_a_linear_decay_falls_by_the_same_in_every_step() -> None:
    shares = torch.tensor([share_of_rate(step, 20, 100, "linear") for step in range(20, 101)])
    assert torch.allclose(shares.diff(), torch.full((80,), -1 / 80))


def test_a_rate_that_is_held_falls_over_what_is_left() -> None:
    shares = [share_of_rate(step, 20, 100, hold=60) for step in range(101)]
    assert shares[19:61] == pytest.approx([1] * 42)
    assert shares[60:] == pytest.approx([share_of_rate(step, 0, 40) for step in range(41)])
    assert share_of_rate(30, 20, 100, hold=10) == share_of_rate(30, 20, 100)
