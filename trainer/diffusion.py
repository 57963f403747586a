"""Noise schedules, what a network may predict, and the weighted loss: tensors in, tensors out.

A noised sample is xt = alpha[t]·x0 + sigma[t]·eps with alpha² + sigma² = 1 (Ho et al. 2020, equation 4, where alpha² is
written ᾱ). This module knows nothing of networks, pictures or text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TIMESTEPS = 1000
WEIGHT_CAP = 5.0  # of "v" weights: on the cosine schedule 1 + SNR passes it below t = 290 and would reach 24,000
MIN_SNR_GAMMA = 5.0

Parameterisation = Literal["x0", "eps", "v"]
Weighting = Literal["v", "uniform", "min_snr"]


@dataclass(frozen=True)
class Schedule:
    """Tables over t = 0 (nearly clean) … T - 1 (nearly noise), float32 (T,)."""

    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha²/sigma² (T,), falling."""
        return (self.alpha / self.sigma) ** 2

    def to(self, device: torch.device | str) -> Schedule:
        """The same tables on another device."""
        return Schedule(self.alpha.to(device), self.sigma.to(device))

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (B,), shaped (B, 1, …) to multiply `like` (B, …)."""
        shape = (-1, *(1,) * (like.ndim - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)


def cosine(timesteps: int = TIMESTEPS) -> Schedule:
    """Nichol and Dhariwal 2021, equation 17, each beta at most 0.999: diffusers' `squaredcos_cap_v2`."""
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return _from_betas((1 - curve[1:] / curve[:-1]).clamp(max=0.999))


def linear(timesteps: int = TIMESTEPS) -> Schedule:
    """Betas from 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled to the number of timesteps."""
    betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * (1000 / timesteps)
    return _from_betas(betas.clamp(max=0.999))


def _from_betas(betas: Tensor) -> Schedule:
    squared = torch.cumprod(1 - betas, dim=0)
    return Schedule(squared.sqrt().float(), (1 - squared).sqrt().float())


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """xt (B, …) at timesteps t (B,)."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def target(schedule: Schedule, kind: Parameterisation, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a perfect network of this kind predicts; v = alpha·eps - sigma·x0 (Salimans and Ho 2022, appendix D)."""
    alpha, sigma = schedule.at(t, x0)
    match kind:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return alpha * eps - sigma * x0


def to_x0(schedule: Schedule, kind: Parameterisation, prediction: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a prediction means. From eps this divides by alpha, which is nearly 0 at the last t."""
    alpha, sigma = schedule.at(t, xt)
    match kind:
        case "x0":
            return prediction
        case "eps":
            return (xt - sigma * prediction) / alpha
        case "v":
            return alpha * xt - sigma * prediction


def to_eps(schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The noise that xt holds if its clean sample is x0."""
    alpha, sigma = schedule.at(t, xt)
    return (xt - alpha * x0) / sigma


def to_v(schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The velocity of xt if its clean sample is x0: (alpha·xt - x0) / sigma."""
    alpha, sigma = schedule.at(t, xt)
    return (alpha * xt - x0) / sigma


def loss(
    schedule: Schedule,
    kind: Parameterisation,
    weighting: Weighting,
    prediction: Tensor,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cap: float = WEIGHT_CAP,
    edges: float = 0.0,
) -> Tensor:
    """Mean squared error of each sample (B,) plus `edges` times its `edge_error`, together weighted, in float32."""
    wrong = prediction.float() - target(schedule, kind, x0.float(), eps.float(), t)
    error = wrong.square().flatten(1).mean(1)
    if edges:
        error = error + edges * edge_error(wrong)
    return error * weights(schedule, kind, weighting, cap)[t]


def edge_error(wrong: Tensor) -> Tensor:
    """Mean squared difference (B,) of errors (B, C, H, W) that are neighbours in a column, and in a row, summed.

    Beside the squared error it makes a Sobolev norm, |e|² + |∇e|²: a quadratic form in the error, so that the mean
    answer remains the best one, and what is learned first is no longer only the coarse.
    """
    down, across = (wrong.diff(dim=axis).square().flatten(1).mean(1) for axis in (2, 3))
    return down + across


def weights(schedule: Schedule, kind: Parameterisation, weighting: Weighting, cap: float = WEIGHT_CAP) -> Tensor:
    """The weight (T,) of a squared error in what the network predicts.

    uniform: 1. v: what makes it the squared error in v, at most `cap`, and so 1 + SNR for x0. min_snr: what makes it
    the squared error in x0 times min(SNR, 5) (Hang et al. 2023, equation 4 and its forms for x0 and v).
    """
    snr = schedule.snr
    in_x0 = {"x0": torch.ones_like(snr), "eps": 1 / snr, "v": schedule.sigma**2}[kind]  # error in x0 per error in kind
    match weighting:
        case "uniform":
            return torch.ones_like(snr)
        case "v":
            return (in_x0 / schedule.sigma**2).clamp(max=cap)  # an error in x0 is sigma times one in v
        case "min_snr":
            return in_x0 * snr.clamp(max=MIN_SNR_GAMMA)
