"""Untrained models of a run, small enough for tests, and a decoder whose answers are known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.clip import Clip
from trainer.conditions import Sizes
from trainer.decoder import Decoder, DecoderConfig
from trainer.diffusion import cosine
from trainer.prior import Prior, PriorConfig, build_prior
from trainer.saved import save_model, write_run
from trainer.upsampler import Upsampler, UpsamplerConfig

PRIOR = PriorConfig(kind="residual", width=32, depth=1)
SPREAD = 0.3  # standard deviation of the pictures that `KnownDecoder` draws


def sizes(clip: Clip) -> Sizes:
    states, mask = clip.text_states([""])
    return Sizes(embedding=clip.dimension, token=states.shape[2], context=clip.context_length, null=int(mask.sum()))


def stirred(model: nn.Module, seed: int = 0) -> None:
    """Random weights also where a fresh model has zeros, so that every input matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5, generator=generator)
    model.eval().requires_grad_(False)


def woken(model: nn.Module) -> nn.Module:
    """A model whose parameters are all random, so that no zero at the start hides anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def prior(clip: Clip) -> Prior:
    torch.manual_seed(0)
    made = build_prior(PRIOR, sizes(clip))
    stirred(made)
    return made


def decoder(clip: Clip) -> Decoder:
    torch.manual_seed(1)
    config = DecoderConfig(side=8, channels=(8, 16), blocks=1, attention=(4,), head=8, groups=4, token_width=8)
    made = Decoder(config, sizes(clip))
    stirred(made)
    return made


def upsampler(clip: Clip) -> Upsampler:
    torch.manual_seed(2)
    config = UpsamplerConfig(side=16, crop=8, factor=2, channels=(8, 16), blocks=1, groups=4)
    made = Upsampler(config, sizes(clip))
    stirred(made)
    return made


class KnownDecoder(Decoder):
    """E[x0 | xt] for independent pixels around a grey of its own for every picture vector; text changes nothing."""

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        image_emb: Tensor,
        text_tokens: Tensor,
        text_mask: Tensor,
        keep_image: Tensor,
        keep_text: Tensor,
    ) -> Tensor:
        alpha, sigma = cosine().at(t, xt)
        mean = (image_emb[:, :1] * keep_image[:, None])[:, :, None, None]
        return mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (xt - alpha * mean)


def known_decoder(clip: Clip, side: int = 8) -> KnownDecoder:
    config = DecoderConfig(side=side, channels=(8,), blocks=1, attention=(), groups=4, token_width=8)
    return KnownDecoder(config, sizes(clip)).eval().requires_grad_(False)


def write_whole_run(folder: Path, clip: Clip, name: str = "mini") -> Path:
    """A run folder with all three models."""
    draws, enlarges, imagines = decoder(clip), upsampler(clip), prior(clip)
    save_model(folder / "prior", PRIOR, sizes(clip), imagines.state_dict(), {})
    save_model(folder / "decoder", draws.config, sizes(clip), draws.state_dict(), {})
    save_model(folder / "upsampler", enlarges.config, sizes(clip), enlarges.state_dict(), {})
    write_run(folder, name, clip.identity, Path("nowhere/curated"), "")
    return folder
