"""Schedules, parameterisations and losses against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.diffusion import (
    Parameterisation,
    Schedule,
    add_noise,
    cosine,
    edge_error,
    linear,
    loss,
    target,
    to_eps,
    to_v,
    to_x0,
    weights,
)

KINDS: tuple[Parameterisation, ...] = ("x0", "eps", "v")
# alphas_cumprod of UnCLIPScheduler in diffusers 0.42.1, float32
UNCLIP = {
    0: 0.9999586939811707,
    1: 0.9999125599861145,
    100: 0.9715756177902222,
    500: 0.4922850430011749,
    900: 0.023616107180714607,
    998: 2.428766265438753e-06,
    999: 2.4287349909002387e-09,
}


@pytest.mark.parametrize("schedule", [cosine(), linear(), linear(100)], ids=["cosine", "linear", "linear-100"])
def test_schedule_goes_from_signal_to_noise(schedule: Schedule) -> None:
    squares = schedule.alpha.double() ** 2 + schedule.sigma.double() ** 2
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=0, atol=1e-6)
    assert bool((schedule.snr.diff() < 0).all())
    assert schedule.alpha[0] ** 2 > 0.998 and 0 < schedule.alpha[-1] ** 2 < 1e-4
    assert bool(schedule.snr.isfinite().all())


def test_cosine_equals_the_unclip_scheduler() -> None:
    squared = cosine().alpha.double() ** 2
    for t, value in UNCLIP.items():
        assert squared[t].item() == pytest.approx(value, rel=2e-5)


def test_linear_equals_the_paper() -> None:
    product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000))
    assert linear().alpha[-1].item() ** 2 == pytest.approx(product, rel=1e-5)


def batch(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, size, 3, 4, 4), generator=generator)
    return x0, eps, torch.linspace(1, 995, size).long()


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_x0_eps_and_v_back(kind: Parameterisation) -> None:
    schedule = Schedule(cosine().alpha.double(), cosine().sigma.double())
    x0, eps, t = batch()
    x0, eps = x0.double(), eps.double()
    xt = add_noise(schedule, x0, t, eps)
    found = to_x0(schedule, kind, target(schedule, kind, x0, eps, t), xt, t)
    torch.testing.assert_close(found, x0, rtol=0, atol=2e-4)  # tables are float32, and eps divides by alpha = 0.006
    torch.testing.assert_close(to_eps(schedule, x0, xt, t), eps)
    torch.testing.assert_close(to_v(schedule, x0, xt, t), target(schedule, "v", x0, eps, t), rtol=0, atol=2e-5)


def test_v_weighting_is_the_loss_in_v_whatever_is_predicted() -> None:
    schedule = cosine()
    x0, eps, t = batch()
    xt = add_noise(schedule, x0, t, eps)
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    v_loss = (to_v(schedule, guess, xt, t) - target(schedule, "v", x0, eps, t)).square().flatten(1).mean(1)
    said = {"x0": guess, "eps": to_eps(schedule, guess, xt, t), "v": to_v(schedule, guess, xt, t)}
    for kind in KINDS:
        found = loss(schedule, kind, "v", said[kind], x0, eps, t, cap=math.inf)
        torch.testing.assert_close(found, v_loss, rtol=5e-3, atol=1e-5)
    plain = (1 + schedule.snr[t]) * (guess - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(schedule, "x0", "v", guess, x0, eps, t, cap=math.inf), plain)


def test_min_snr_is_the_same_loss_whatever_is_predicted() -> None:
    schedule = cosine()
    snr = schedule.snr
    torch.testing.assert_close(weights(schedule, "x0", "min_snr"), snr.clamp(max=5))
    torch.testing.assert_close(weights(schedule, "eps", "min_snr"), (5 / snr).clamp(max=1))
    torch.testing.assert_close(weights(schedule, "v", "min_snr"), snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=1e-6)


def test_weights_are_capped_and_finite() -> None:
    schedule = cosine()
    x0_weights = weights(schedule, "x0", "v", cap=20)
    assert x0_weights.max() == 20 and x0_weights.min() == pytest.approx(1)
    assert bool((x0_weights.diff() <= 0).all())
    assert weights(schedule, "eps", "v", cap=20).max() == 20
    torch.testing.assert_close(weights(schedule, "v", "v"), torch.ones(1000))
    for kind in KINDS:
        assert bool((weights(schedule, kind, "uniform") == 1).all())


def test_a_head_of_zeros_loses_what_it_should() -> None:
    """Predicting nothing costs E|x0|² for x0, 1 for eps, and their mix for v, at every noise level."""
    schedule = cosine()
    generator = torch.Generator().manual_seed(2)
    x0, eps = torch.randn((2, 400, 3, 16, 16), generator=generator)
    x0 = 0.5 * x0
    t = torch.arange(400) * 2
    nothing = torch.zeros_like(x0)
    for kind, wanted in (("x0", 0.25), ("eps", 1.0)):
        found = loss(schedule, kind, "uniform", nothing, x0, eps, t)  # type: ignore[arg-type]
        for part in found.view(4, 100):
            assert part.mean().item() == pytest.approx(wanted, rel=0.02)
    mixed = schedule.alpha[t] ** 2 + 0.25 * schedule.sigma[t] ** 2
    torch.testing.assert_close(loss(schedule, "v", "uniform", nothing, x0, eps, t), mixed, rtol=0.25, atol=0)


def test_edge_errors_of_a_ramp_are_its_squared_slopes() -> None:
    down, across = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    ramp = (0.3 * down - 0.5 * across + 2).expand(1, 3, 5, 7)
    torch.testing.assert_close(edge_error(torch.cat([ramp, torch.ones(1, 3, 5, 7)])), torch.tensor([0.34, 0.0]))


def test_with_edges_the_mean_answer_is_still_the_best_and_the_weights_are_the_same() -> None:
    schedule = cosine()
    x0, eps, _ = batch()
    t = torch.full((len(x0),), 700)
    guess = x0.mean(0).expand_as(x0).clone().requires_grad_()
    loss(schedule, "x0", "v", guess, x0, eps, t, edges=2.0).sum().backward()
    assert guess.grad is not None
    torch.testing.assert_close(guess.grad.sum(0), torch.zeros(3, 4, 4), rtol=0, atol=1e-5)  # one answer for all
    plain, both = (loss(schedule, "x0", "v", guess, x0, eps, t, edges=edges) for edges in (0.0, 2.0))
    weight = weights(schedule, "x0", "v")[700]
    torch.testing.assert_close(both - plain, 2 * weight * edge_error(x0 - guess))


def test_the_loss_is_per_sample_and_in_float32() -> None:
    schedule = cosine()
    x0, eps, t = batch(4)
    prediction = x0.clone()
    prediction[2] += 1
    found = loss(schedule, "x0", "uniform", prediction.bfloat16(), x0, eps, t)
    assert found.dtype == torch.float32 and found.shape == (4,)
    assert found[2] == pytest.approx(1, rel=0.01) and found[[0, 1, 3]].max() < 1e-3
