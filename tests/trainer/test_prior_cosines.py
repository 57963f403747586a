"""A prior's cosines against those that its closed form says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import parse_config
from trainer.cascade import How, Words
from trainer.conditions import Sizes
from trainer.prior import LinearPrior, Prior, PriorConfig, ResidualPrior
from trainer.prior_cosines import ROWS, prior_cosines

WIDTH, MANY = 16, 2 * ROWS + 30
SIZES = Sizes(embedding=WIDTH, token=12, context=20, null=2)
PLAIN = How(prior_steps=50, prior_guidance=1)


def words() -> Words:
    vectors = F.normalize(torch.randn(MANY, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    return Words(vectors, torch.zeros(MANY, 0, 12), torch.zeros(MANY, 0, dtype=torch.bool))


def whitened(prior: Prior) -> None:
    prior.image.mean.fill_(1.5)
    prior.image.std.fill_(0.5)


def test_of_a_linear_prior_all_answers_are_the_same() -> None:
    prior, texts = LinearPrior(SIZES), words()
    whitened(prior)
    prior.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))
    true = F.normalize(1.5 + 0.5 * texts.vectors @ prior.weight.T, dim=1)
    cosines = prior_cosines(prior, texts, true, {"other": true.roll(1, 0)}, 0, PLAIN)
    assert set(cosines) == {"sampled", "one_step", "other", "two_samples"}
    assert all(cosines[name] == pytest.approx(1, abs=1e-5) for name in ("sampled", "one_step", "two_samples"))
    assert cosines["other"] == pytest.approx(float((true * true.roll(1, 0)).sum(dim=1).mean()), abs=1e-5)


@torch.no_grad()
def test_samples_of_a_normal_vector_are_as_near_to_one_another_as_to_the_true_one() -> None:
    torch.manual_seed(0)
    prior = ResidualPrior(SIZES, parse_config(PriorConfig, {"width": 32, "depth": 1}, "test"))
    whitened(prior)
    prior.fit_axes(torch.randn(4000, WIDTH), torch.randn(4000, WIDTH))

    def drawn() -> Tensor:
        return F.normalize(1.5 + 0.5 * torch.randn(MANY, WIDTH), dim=1)

    true = drawn()
    across = float((true * drawn()).sum(dim=1).mean())
    cosines = prior_cosines(prior, words(), true, {}, 7, PLAIN)
    assert cosines["two_samples"] == pytest.approx(across, abs=0.02)
    assert cosines["sampled"] == pytest.approx(across, abs=0.02)
    assert cosines["one_step"] == pytest.approx(across**0.5, abs=0.01)
