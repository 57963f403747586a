"""From noise to samples: DDPM, DDIM and its inversion, DPM-Solver++(2M), Heun, guidance, and known pixels.

Every sampler takes a `denoise` that gives x0 for xt at t, and walks down timesteps `ts`, the last step ending at the
clean sample (alpha 1, sigma 0). This module knows nothing of networks or conditions.

The deterministic samplers integrate the same equation, in λ = log(alpha/sigma) (Lu et al. 2022, "DPM-Solver++",
equation 9):  x(λ₂) = (σ₂/σ₁)·x(λ₁) + σ₂·∫ exp(λ)·x0(λ) dλ.  They differ in what they take for x0 on the way: DDIM its
start, DPM-Solver++(2M) a line through the last two points, Heun the mean of both ends. In λ, unlike in
sigma/alpha, Heun stays stable in the first step, where the cosine schedule's sigma/alpha falls by hundreds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trainer.diffusion import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]  # xt (B, …), t int64 (B,) => x0 (B, …)
Noise = Callable[[], Tensor]  # => the next standard normal (B, …)
Keep = Callable[[Tensor, float, float], Tensor]  # x (B, …) at alpha, sigma => the same with known parts put in
Spacing = Literal["even", "trailing"]


def steps(timesteps: int, n: int, spacing: Spacing = "even") -> list[int]:
    """`n` falling timesteps from T - 1: `even` ends at 0, as UnCLIPScheduler; `trailing` a whole step above clean.

    Where n exceeds T, all T are given.
    """
    n = max(1, min(n, timesteps))
    if spacing == "trailing" or n == 1:
        return [round(timesteps * (n - i) / n) - 1 for i in range(n)]
    return [round((timesteps - 1) * (n - 1 - i) / (n - 1)) for i in range(n)]


class _Step(NamedTuple):
    """One step between two noise levels, from `t` at (alpha1, sigma1)."""

    t: int
    alpha1: float
    sigma1: float
    alpha2: float
    sigma2: float

    @property
    def last(self) -> bool:
        return self.sigma2 == 0

    @property
    def h(self) -> float:
        """The step in λ; infinite in the last step down."""
        return math.inf if self.last else math.log(self.alpha2 / self.sigma2) - math.log(self.alpha1 / self.sigma1)

    def take(self, x: Tensor, x0: Tensor) -> Tensor:
        """The integral with x0 held fixed: exact for a fixed x0."""
        if self.last:
            return x0
        ratio = self.sigma2 / self.sigma1
        return ratio * x + (self.alpha2 - self.alpha1 * ratio) * x0


def _walk(schedule: Schedule, ts: Sequence[int]) -> Iterator[_Step]:
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    for t, after in zip(ts, [*ts[1:], None], strict=True):
        end = (1.0, 0.0) if after is None else (alpha[after], sigma[after])
        yield _Step(t, alpha[t], sigma[t], *end)


def _times(xt: Tensor, t: int) -> Tensor:
    return torch.full((len(xt),), t, dtype=torch.int64, device=xt.device)


def keep_nothing(xt: Tensor, alpha: float, sigma: float) -> Tensor:
    """The `Keep` of samples of which nothing is known."""
    del alpha, sigma
    return xt


def ddim(denoise: Denoise, xt: Tensor, schedule: Schedule, ts: Sequence[int], keep: Keep = keep_nothing) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with σ = 0). First order."""
    for step in _walk(schedule, ts):
        xt = keep(step.take(xt, denoise(xt, _times(xt, step.t))), step.alpha2, step.sigma2)
    return xt


def ddim_noisy(
    denoise: Denoise,
    xt: Tensor,
    schedule: Schedule,
    ts: Sequence[int],
    noise: Noise,
    eta: float,
    keep: Keep = keep_nothing,
) -> Tensor:
    """DDIM with `eta` times the noise of DDPM in each step (Song et al. 2020, equations 12 and 16)."""
    for step in _walk(schedule, ts):
        x0 = denoise(xt, _times(xt, step.t))
        if step.last:
            xt = x0
        else:
            eps = (xt - step.alpha1 * x0) / step.sigma1
            shrink = (step.alpha1 / step.alpha2) ** 2
            fresh = eta * step.sigma2 / step.sigma1 * math.sqrt(max(0.0, 1 - shrink))
            held = math.sqrt(max(0.0, step.sigma2**2 - fresh**2))
            xt = step.alpha2 * x0 + held * eps + fresh * noise()
        xt = keep(xt, step.alpha2, step.sigma2)
    return xt


def ddpm(
    denoise: Denoise, xt: Tensor, schedule: Schedule, ts: Sequence[int], noise: Noise, keep: Keep = keep_nothing
) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, equation 7), on any timesteps."""
    return ddim_noisy(denoise, xt, schedule, ts, noise, eta=1.0, keep=keep)


def ddim_invert(denoise: Denoise, x0: Tensor, schedule: Schedule, ts: Sequence[int]) -> Tensor:
    """The xt at ts[0] from which `ddim` on the same `ts` comes back to x0: its equation run upwards.

    A clean sample is taken as the point at t = 0, so the way back is exact only in the limit of many steps.
    """
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    ups = [0, *(t for t in reversed(ts) if t > 0)]
    xt = x0
    for t, after in pairwise(ups):
        step = _Step(t, alpha[t], sigma[t], alpha[after], sigma[after])
        xt = step.take(xt, denoise(xt, _times(xt, t)))
    return xt


def dpm_solver(
    denoise: Denoise, xt: Tensor, schedule: Schedule, ts: Sequence[int], keep: Keep = keep_nothing
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one evaluation per step, second order.

    The step onto the last t is much longer in λ than the one before where the steps are even in t: a line through
    the two would overshoot, so that step is of first order, which leaves the order of the whole.
    """
    before: tuple[Tensor, float] | None = None  # the last x0 and the last step in λ
    for place, step in enumerate(_walk(schedule, ts)):
        x0 = denoise(xt, _times(xt, step.t))
        line = x0
        if before is not None and place < len(ts) - 2:
            line = x0 + (x0 - before[0]) * (0.5 * step.h / before[1])
        xt = keep(step.take(xt, line), step.alpha2, step.sigma2)
        before = x0, step.h
    return xt


def heun(denoise: Denoise, xt: Tensor, schedule: Schedule, ts: Sequence[int], keep: Keep = keep_nothing) -> Tensor:
    """Heun's method in λ: two evaluations per step but the last, second order."""
    ends = [*ts[1:], 0]
    for step, t2 in zip(_walk(schedule, ts), ends, strict=True):
        x0 = denoise(xt, _times(xt, step.t))
        ahead = step.take(xt, x0)
        if not step.last:
            ahead = step.take(xt, (x0 + denoise(ahead, _times(xt, t2))) / 2)
        xt = keep(ahead, step.alpha2, step.sigma2)
    return xt


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): scale 0 is `null`, 1 is `conditional`, both exactly."""
    return torch.lerp(null, conditional, scale)


def guide_two(both: Tensor, one: Tensor, null: Tensor, one_scale: float, other_scale: float) -> Tensor:
    """Guidance by two conditions (Brooks et al. 2022, "InstructPix2Pix", equation 3).

    null + one_scale·(one - null) + other_scale·(both - one): `one` is conditioned on the first alone, `both` on both.
    """
    return guide(one, null, one_scale) + other_scale * (both - one)


def dynamic_clip(x0: Tensor, quantile: float = 0.995) -> Tensor:
    """Values back into [-1, 1], each sample divided by its `quantile` of |x0| where that exceeds 1.

    Saharia et al. 2022 ("Imagen"), section 2.3.
    """
    reach = torch.quantile(x0.flatten(1).abs().float(), quantile, dim=1).clamp(min=1)
    reach = reach.view(-1, *(1,) * (x0.ndim - 1)).to(x0.dtype)
    return x0.clamp(-reach, reach) / reach


def known(x0: Tensor, mask: Tensor, noise: Noise) -> Keep:
    """Keep x0 where `mask` (bool, broadcast to x0) is true: at each step with fresh noise, at the end exactly."""

    def keep(xt: Tensor, alpha: float, sigma: float) -> Tensor:
        return torch.where(mask, x0 if sigma == 0 else alpha * x0 + sigma * noise(), xt)

    return keep


def seed_for(*parts: int | str) -> int:
    """A seed of 63 bits from parts, such as (7, "decoder", 2): equal for equal parts, unrelated for others."""
    text = "\n".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def noise_for(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Standard normals (len(seeds), *shape), fresh at each call, from one generator per sample.

    They are drawn on the CPU, so a sample's noise depends on its seed alone, not on its batch or the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        drawn = [torch.randn(tuple(shape), generator=generator) for generator in generators]
        return torch.stack(drawn).to(device) if drawn else torch.empty((0, *shape), device=device)

    return draw


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """From a to b along the circle through both, over the last axis (…, D); the length goes in a straight line.

    Safe for equal vectors, and for opposite ones, which go round by the axis that `a` uses least.
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    start, end = a / length_a, b / length_b
    angle = 2 * torch.atan2((start - end).norm(dim=-1, keepdim=True), (start + end).norm(dim=-1, keepdim=True))
    spare = torch.zeros_like(start).scatter_(-1, start.abs().argmin(-1, keepdim=True), 1.0)
    side = _reject(end, start)
    side = torch.where(side.norm(dim=-1, keepdim=True) > 1e-6, side, _reject(spare, start))
    side = _reject(side / side.norm(dim=-1, keepdim=True), start)  # again, now that rounding is small beside it
    side = side / side.norm(dim=-1, keepdim=True)
    turned: Tensor = torch.cos(weight * angle) * start + torch.sin(weight * angle) * side
    return turned * torch.lerp(length_a, length_b, weight)


def _reject(vector: Tensor, unit: Tensor) -> Tensor:
    """The part of a vector at right angles to a unit vector."""
    return vector - (vector * unit).sum(-1, keepdim=True) * unit
