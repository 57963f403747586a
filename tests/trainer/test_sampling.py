"""Samplers against Gaussians, whose best denoiser, flow and posterior have closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainer.cascade import DEFAULT
from trainer.diffusion import Schedule, cosine
from trainer.sampling import (
    Denoise,
    ddim,
    ddim_invert,
    ddim_noisy,
    ddpm,
    dpm_solver,
    dynamic_clip,
    guide,
    guide_two,
    heun,
    known,
    noise_for,
    seed_for,
    slerp,
    steps,
)

MEAN = torch.tensor([1.0, -0.5])
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
Solver = Callable[[Denoise, Tensor, Schedule, list[int]], Tensor]
SOLVERS: dict[str, Solver] = {"ddim": ddim, "dpm_solver": dpm_solver, "heun": heun}


def gaussian(schedule: Schedule, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> Denoise:
    """E[x0 | xt] where x0 is Gaussian: mean + alpha·C·(alpha²·C + sigma²)⁻¹·(xt - alpha·mean)."""

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (len(xt),)
        alpha, sigma = schedule.alpha[t[0]].to(xt), schedule.sigma[t[0]].to(xt)
        c = covariance.to(xt)
        gain = alpha * c @ torch.linalg.inv(alpha**2 * c + sigma**2 * torch.eye(len(c)).to(xt))
        guess: Tensor = mean.to(xt) + (xt - alpha * mean.to(xt)) @ gain.T
        return guess

    return denoise


def check_moments(samples: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(samples.mean(0), MEAN, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cov(samples.T), COVARIANCE, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spacing", ["even", "trailing"])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_recover_a_gaussian(name: str, spacing: str) -> None:
    schedule = cosine()
    start = torch.randn((20_000, 2), generator=torch.Generator().manual_seed(0))
    ts = steps(1000, 200, spacing)  # type: ignore[arg-type]
    check_moments(SOLVERS[name](gaussian(schedule), start, schedule, ts), 0.03)


@pytest.mark.parametrize("count", [DEFAULT.large_steps, DEFAULT.prior_steps, DEFAULT.steps])
def test_the_few_steps_that_are_shipped_recover_a_gaussian(count: int) -> None:
    schedule = cosine()
    start = torch.randn((20_000, 2), generator=torch.Generator().manual_seed(0))
    check_moments(dpm_solver(gaussian(schedule), start, schedule, steps(1000, count)), 0.05)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_samplers_recover_a_gaussian(eta: float) -> None:
    schedule = cosine()
    noise = noise_for([0], (20_000, 2))
    samples = ddim_noisy(gaussian(schedule), noise()[0], schedule, steps(1000, 500), lambda: noise()[0], eta)
    check_moments(samples, 0.03)


def test_ddpm_takes_the_posterior_step() -> None:
    """One step from t to t - 1 has the mean and the variance of q(x | xt, x0), Ho et al. 2020, equation 7."""
    schedule = cosine()
    t, x0, xt = 400, 0.3, -0.8
    before, now = schedule.alpha[t - 1].double() ** 2, schedule.alpha[t].double() ** 2
    beta = 1 - now / before
    mean = before.sqrt() * beta / (1 - now) * x0 + (now / before).sqrt() * (1 - before) / (1 - now) * xt
    variance = (1 - before) / (1 - now) * beta
    seen: list[Tensor] = []

    def denoise(x: Tensor, _: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, x0)

    noise = noise_for([1], (200_000, 1))
    ddpm(denoise, torch.full((200_000, 1), xt), schedule, [t, t - 1], lambda: noise()[0])
    assert seen[1].mean().item() == pytest.approx(mean.item(), abs=1e-3)
    assert seen[1].var().item() == pytest.approx(variance.item(), rel=0.02)


def test_eta_zero_is_ddim() -> None:
    schedule, ts = cosine(), steps(1000, 20)
    noise = noise_for(range(8), (2,))
    start = noise()
    left = ddim_noisy(gaussian(schedule), start, schedule, ts, noise, eta=0)
    torch.testing.assert_close(left, ddim(gaussian(schedule), start, schedule, ts), rtol=0, atol=1e-5)


def even_in_lambda(n: int) -> Schedule:
    """A schedule of n + 1 levels with λ from 4 down to -4."""
    ends = torch.linspace(4, -4, n + 1, dtype=torch.float64)
    return Schedule(torch.sigmoid(2 * ends).sqrt(), torch.sigmoid(-2 * ends).sqrt())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver", 2), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(name: str, order: int) -> None:
    """The flow of a Gaussian keeps (x - alpha·mean) / sqrt(alpha²·s² + sigma²); the last jump is the denoiser's."""
    deviation, mean = 0.5, 0.7
    x = torch.tensor([[2.0]], dtype=torch.float64)
    errors = []
    for n in (32, 64, 128, 256):
        schedule = even_in_lambda(n)
        denoise = gaussian(schedule, torch.tensor([mean]), torch.tensor([[deviation**2]]))
        (a0, a1), (s0, s1) = ((table[0], table[-1]) for table in (schedule.alpha, schedule.sigma))
        spread = ((a0**2 * deviation**2 + s0**2) / (a1**2 * deviation**2 + s1**2)).sqrt()
        wanted = denoise(a0 * mean + (x - a1 * mean) * spread, torch.tensor([0]))
        found = SOLVERS[name](denoise, x, schedule, list(range(n, -1, -1)))
        errors.append((found - wanted).abs().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.15), (errors, slopes)


def test_one_step_gives_the_denoisers_guess_and_every_sampler_ends_there() -> None:
    schedule = cosine()
    start = noise_for([3], (2,))()
    guess = gaussian(schedule)(start, torch.tensor([999]))
    for solver in SOLVERS.values():
        assert torch.equal(solver(gaussian(schedule), start, schedule, steps(1000, 1)), guess)


def test_steps_fall_from_noise() -> None:
    assert steps(1000, 5) == [999, 749, 500, 250, 0]  # UnCLIPScheduler's
    assert steps(1000, 5, "trailing") == [999, 799, 599, 399, 199]
    assert steps(1000, 1) == [999] and steps(10, 50) == list(range(9, -1, -1))
    for n in range(1, 120):
        for spacing in ("even", "trailing"):
            ts = steps(100, n, spacing)
            assert ts[0] == 99 and ts[-1] >= 0 and len(ts) == min(n, 100) == len(set(ts))
            assert ts == sorted(ts, reverse=True)


def test_inversion_comes_back_the_better_the_more_steps() -> None:
    schedule = cosine()
    denoise = gaussian(schedule)
    root = torch.linalg.cholesky(COVARIANCE)
    x0 = MEAN + torch.randn((500, 2), generator=torch.Generator().manual_seed(4)) @ root.T
    errors = []
    for n in (10, 40, 160, 640):
        ts = steps(1000, n)
        xt = ddim_invert(denoise, x0, schedule, ts)
        errors.append((ddim(denoise, xt, schedule, ts) - x0).abs().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3] and errors[3] < 0.01, errors
    torch.testing.assert_close(torch.cov(xt.T), torch.eye(2), rtol=0, atol=0.15)  # and what it finds is noise


def test_guidance_algebra() -> None:
    conditional, null, one = torch.randn((3, 4, 5), generator=torch.Generator().manual_seed(5))
    assert torch.equal(guide(conditional, null, 1), conditional)
    assert torch.equal(guide(conditional, null, 0), null)
    torch.testing.assert_close(guide(conditional, null, 3), null + 3 * (conditional - null))
    torch.testing.assert_close(guide_two(conditional, one, null, 1, 1), conditional)
    torch.testing.assert_close(guide_two(conditional, one, null, 0, 0), null)
    assert torch.equal(guide_two(conditional, one, null, 1, 0), one)
    torch.testing.assert_close(guide_two(conditional, one, null, 2, 2), guide(conditional, null, 2))


def test_dynamic_clip() -> None:
    calm, wild = torch.linspace(-0.9, 0.9, 100), torch.linspace(-4, 4, 100)
    clipped = dynamic_clip(torch.stack([calm, wild]), 0.9)
    assert torch.equal(clipped[0], calm)
    assert clipped[1].abs().max() == 1
    scale = torch.quantile(wild.abs(), 0.9)
    torch.testing.assert_close(clipped[1][40:60], wild[40:60] / scale)


@pytest.mark.parametrize("name", [*SOLVERS, "ddpm"])
def test_known_pixels_stay_exactly(name: str) -> None:
    schedule, ts = cosine(), steps(1000, 12)
    picture = torch.rand((2, 3, 4, 4), generator=torch.Generator().manual_seed(6)) * 2 - 1
    mask = torch.zeros((1, 1, 4, 4), dtype=torch.bool)
    mask[..., :2] = True

    def denoise(xt: Tensor, _: Tensor) -> Tensor:
        return 0.5 * xt.mean((2, 3), keepdim=True).expand_as(xt)

    def run(mask: Tensor) -> Tensor:
        noise = noise_for([0, 1], (3, 4, 4))
        keep = known(picture, mask, noise)
        if name == "ddpm":
            return ddpm(denoise, noise(), schedule, ts, noise, keep)
        solver = {"ddim": ddim, "dpm_solver": dpm_solver, "heun": heun}[name]
        return solver(denoise, noise(), schedule, ts, keep)

    half = run(mask)
    assert torch.equal(half[..., :2], picture[..., :2])
    assert not torch.equal(half[..., 2:], picture[..., 2:])
    assert torch.equal(run(torch.ones_like(mask)), picture)
    free = run(torch.zeros_like(mask))
    assert bool((free != picture).all())


def test_inpainting_a_gaussian_follows_the_known_half() -> None:
    """With one of two correlated numbers known, the other leans the right way."""
    schedule = cosine()
    mask = torch.tensor([True, False])
    noise = noise_for([0], (4000, 2))
    ts = steps(1000, 200)
    means = []
    for first in (0.0, 2.0):
        keep = known(torch.tensor([first, 0.0]).expand(4000, 2), mask, lambda: noise()[0])
        samples = ddpm(gaussian(schedule), noise()[0], schedule, ts, lambda: noise()[0], keep)
        means.append(samples[:, 1].mean().item())
    assert means[1] - means[0] == pytest.approx(2 * 0.6, rel=0.35)  # the exact conditional mean moves by 0.6 per unit


def test_noise_is_the_samples_own() -> None:
    together, alone = noise_for([5, 6, 7], (2, 3)), noise_for([6], (2, 3))
    for _ in range(3):
        assert torch.equal(together()[1], alone()[0])
    assert not torch.equal(together()[0], together()[1])
    assert noise_for([], (2, 3))().shape == (0, 2, 3)


def test_seeds_differ_by_every_part() -> None:
    seeds = {seed_for(n, stage, k) for n in range(20) for stage in ("prior", "decoder") for k in range(20)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(1, "prior", 2) == seed_for(1, "prior", 2) != seed_for(12, "prior")


def units(n: int, seed: int) -> Tensor:
    vectors = torch.randn((n, 16), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.mark.parametrize("case", ["apart", "equal", "opposite", "nearly equal", "nearly opposite"])
def test_slerp_stays_on_the_sphere(case: str) -> None:
    a, other = units(50, 7), units(50, 8)
    b = {
        "apart": other,
        "equal": a,
        "opposite": -a,
        "nearly equal": a + 1e-6 * other,
        "nearly opposite": -a + 1e-6 * other,
    }[case]
    b = b / b.norm(dim=-1, keepdim=True)
    for weight in (0.0, 0.25, 0.5, 1.0):
        between = slerp(a, b, weight)
        torch.testing.assert_close(between.norm(dim=-1), torch.ones(50))
        angle = torch.acos((a * b).sum(-1).clamp(-1, 1))
        turned = torch.acos((a * between).sum(-1).clamp(-1, 1))
        torch.testing.assert_close(turned, weight * angle, rtol=0, atol=2e-3)
    torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=0, atol=3e-6)


def test_slerp_takes_lengths_and_weights_per_row() -> None:
    a, b = 2 * units(3, 9), 4 * units(3, 10)
    found = slerp(a, b, torch.tensor([[0.0], [0.5], [1.0]]))
    torch.testing.assert_close(found.norm(dim=-1), torch.tensor([2.0, 3.0, 4.0]))
    torch.testing.assert_close(found[2], b[2])
