"""Text vector → picture vector → small picture → large picture: the networks as denoisers, guided and sampled.

Tensors in, tensors out; networks run in bfloat16 where the machine is quicker so, samplers in float32. This module
knows nothing of files, of the CLIP or of what a picture is wanted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.decoder import Decoder
from trainer.diffusion import cosine, to_x0
from trainer.prior import Prior, better_of
from trainer.sampling import (
    Denoise,
    Keep,
    ddim_invert,
    ddim_noisy,
    dpm_solver,
    dynamic_clip,
    guide,
    guide_two,
    keep_nothing,
    noise_for,
    seed_for,
    steps,
)
from trainer.speed import quick
from trainer.upsampler import Upsampler, worsened

CANDIDATES = 2  # of the prior, per picture (Ramesh et al. 2022, section 2.2)


@dataclass(frozen=True)
class How:
    """Steps of each stage, and guidance: 1 is the condition alone, more exaggerates it."""

    prior_steps: int = 16
    steps: int = 24
    large_steps: int = 12
    prior_guidance: float = 1.25  # little, so that the pictures of a text still differ
    image_guidance: float = 2.0
    text_guidance: float = 2.0  # of what the text says beyond the picture vector


DEFAULT = How()


@dataclass(frozen=True)
class Words:
    """Texts as the CLIP encodes them: unit vectors (B, D), token states (B, N, W) and their mask (B, N)."""

    vectors: Tensor
    tokens: Tensor
    mask: Tensor

    def take(self, rows: Sequence[int] | slice) -> Words:
        """Some of them, or one several times."""
        return Words(self.vectors[rows], self.tokens[rows], self.mask[rows])

    def times(self, count: int) -> Words:
        """All of them, `count` times over."""
        return Words(self.vectors.repeat(count, 1), self.tokens.repeat(count, 1, 1), self.mask.repeat(count, 1))


def imagine(prior: Prior, words: Words, seeds: Sequence[int], how: How) -> Tensor:
    """Unit picture vectors (B, D) for texts: the better of two draws each."""
    device, width = words.vectors.device, words.vectors.shape[1]
    schedule = cosine().to(device)
    passes = 2 if prior.guided and how.prior_guidance != 1 else 1  # the second without text
    shown = words.times(passes)
    keep_text = torch.arange(passes * len(seeds), device=device) < len(seeds)

    def denoise(zt: Tensor, t: Tensor) -> Tensor:
        many = zt.repeat(passes, 1), t.repeat(passes)
        with quick(device):
            raw = prior(*many, shown.vectors, shown.tokens, shown.mask, keep_text)
        guesses = raw.float().chunk(passes)
        return guide(guesses[0], guesses[1], how.prior_guidance) if passes == 2 else guesses[0]

    drawn = []
    for number in range(CANDIDATES):
        start = noise_for([seed_for(seed, "prior", number) for seed in seeds], (width,), device)()
        white = dpm_solver(denoise, start, schedule, steps(len(schedule), how.prior_steps))
        drawn.append(F.normalize(prior.image.inverse(white), dim=1))
    return better_of(torch.stack(drawn), words.vectors)


def decoder_denoise(decoder: Decoder, vectors: Tensor, words: Words | None, how: How) -> Denoise:
    """The guided decoder; without words its text condition is the null.

    Picture vector and text are guided together where their scales are equal, else one after the other.
    """
    schedule = cosine().to(vectors.device)
    keeps = [(True, words is not None)]  # picture vector, text
    if words is not None and how.text_guidance != how.image_guidance:
        keeps.append((True, False))
    if how.image_guidance != 1 or len(keeps) > 1:
        keeps.append((False, False))
    batch, passes = len(vectors), len(keeps)
    shown = (words or _no_words(decoder, batch)).times(passes)
    keep = torch.tensor(keeps, device=vectors.device).repeat_interleave(batch, dim=0)
    pictured = vectors.repeat(passes, 1)

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        many = xt.repeat(passes, 1, 1, 1), t.repeat(passes)
        with quick(xt.device):
            raw = decoder(*many, pictured, shown.tokens, shown.mask, keep[:, 0], keep[:, 1])
        guesses = to_x0(schedule, decoder.config.predicts, raw.float(), *many).chunk(passes)
        guess = guesses[0]
        if passes == 2:
            guess = guide(guess, guesses[1], how.image_guidance)
        elif passes == 3:
            guess = guide_two(guess, guesses[1], guesses[2], how.image_guidance, how.text_guidance)
        return dynamic_clip(guess)

    return denoise


def _no_words(decoder: Decoder, batch: int) -> Words:
    tokens = decoder.null.tokens.expand(batch, -1, -1)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Words(decoder.null.embedding.expand(batch, -1), tokens, mask)


def decoder_noise(decoder: Decoder, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Where drawing starts (B, 3, side, side)."""
    side = decoder.config.side
    return noise_for([seed_for(seed, "decoder") for seed in seeds], (3, side, side), device)()


def draw(denoise: Denoise, start: Tensor, how: How, keep: Keep = keep_nothing) -> Tensor:
    """Small pictures (B, 3, side, side) in [-1, 1], from noise."""
    schedule = cosine().to(start.device)
    return dpm_solver(denoise, start, schedule, steps(len(schedule), how.steps), keep).clamp(-1, 1)


def invert(denoise: Denoise, small: Tensor, how: How) -> Tensor:
    """The noise from which `redraw` with eta 0 comes back to these pictures."""
    schedule = cosine().to(small.device)
    return ddim_invert(denoise, small, schedule, steps(len(schedule), how.steps))


def redraw(denoise: Denoise, start: Tensor, seeds: Sequence[int], eta: float, how: How) -> Tensor:
    """Small pictures from what `invert` found; eta 0 draws them again, 1 forgets most but the picture vector."""
    schedule = cosine().to(start.device)
    noise = noise_for([seed_for(seed, "redraw") for seed in seeds], start.shape[1:], start.device)
    return ddim_noisy(denoise, start, schedule, steps(len(schedule), how.steps), noise, eta).clamp(-1, 1)


def enlarge(upsampler: Upsampler, small: Tensor, seeds: Sequence[int], how: How, keep: Keep = keep_nothing) -> Tensor:
    """Large pictures (B, 3, S, S) in [-1, 1]; the small ones are blurred as in training."""
    schedule = cosine().to(small.device)
    soft = worsened(small, upsampler.config.blur, torch.zeros_like(small), small.new_zeros(len(small)))
    side = small.shape[-1] * upsampler.config.factor

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        with quick(xt.device):
            raw = upsampler(xt, t, soft)
        return dynamic_clip(to_x0(schedule, upsampler.config.predicts, raw.float(), xt, t))

    start = noise_for([seed_for(seed, "upsampler") for seed in seeds], (3, side, side), small.device)()
    return dpm_solver(denoise, start, schedule, steps(len(schedule), how.large_steps), keep).clamp(-1, 1)
