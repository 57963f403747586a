"""Whether the sizes in models' configs go together: said before anything is trained or drawn. It builds nothing."""

from __future__ import annotations

import math

from pipeline.base import Config, HeadraceError
from trainer.decoder import DecoderConfig
from trainer.prior import PriorConfig
from trainer.unet import UNetConfig
from trainer.upsampler import UpsamplerConfig


def check_sizes(config: Config) -> None:
    """Raise a `HeadraceError` that names the first key of a prior's, decoder's or upsampler's config that cannot be."""
    if isinstance(config, PriorConfig):
        _check_prior(config)
    elif isinstance(config, UpsamplerConfig):
        for key, side in (("side", config.side), ("crop", config.crop)):
            _check_multiple(f"upsampler.{key}", side, math.lcm(config.multiple, config.factor))
        if config.crop > config.side:
            raise HeadraceError(f"upsampler.crop {config.crop} exceeds upsampler.side {config.side}", hint="lower it")
        _check_unet("upsampler", config, config.side)
    elif isinstance(config, DecoderConfig):
        _check_multiple("decoder.side", config.side, config.multiple)
        _check_unet("decoder", config, config.side)


def misfit(decoder: DecoderConfig, upsampler: UpsamplerConfig) -> str | None:
    """Why the upsampler cannot take what the decoder draws, as a sentence; None where it can."""
    if upsampler.small == decoder.side:
        return None
    takes = f"the upsampler takes {upsampler.small} (its side {upsampler.side} / its factor {upsampler.factor})"
    return f"decoder.side is {decoder.side}, but {takes}"


def _check_prior(config: PriorConfig) -> None:
    if config.kind != "transformer":
        return
    if config.width % config.head:
        message = f"prior.width {config.width} is not a multiple of prior.head {config.head}"
        raise HeadraceError(message, hint="change one of them")
    _check_even("prior.width", config.width)


def _check_unet(name: str, config: UNetConfig, side: int) -> None:
    """Raise where it is asked to attend on a grid that it has not, or with heads that do not fill its channels."""
    _check_even(f"{name}.channels", config.channels[0])
    for width in config.channels:
        if config.groups and width % config.groups:
            hint = f"change {name}.groups or {name}.channels; 0 groups go with any"
            raise HeadraceError(f"{name}.groups {config.groups} does not divide the {width} channels of a level", hint)
    grids = {side // config.patch // 2**level: width for level, width in enumerate(config.channels)}
    for grid in config.attention:
        if grid not in grids:
            hint = f"choose among {', '.join(map(str, grids))}"
            raise HeadraceError(f"{name}.attention {grid} is the side of no grid of {name}", hint=hint)
        width = grids[grid]
        if width % max(1, width // config.head):
            hint = f"change {name}.head or {name}.channels"
            raise HeadraceError(f"{name}.head {config.head} does not divide the {width} channels that attend", hint)


def _check_multiple(key: str, side: int, multiple: int) -> None:
    if side % multiple:
        hint = "change it, or channels, patch or factor"
        raise HeadraceError(f"{key} {side} is not a multiple of {multiple}", hint=hint)


def _check_even(key: str, width: int) -> None:
    """Times are told by pairs of a sine and a cosine."""
    if width % 2:
        raise HeadraceError(f"{key} {width} is odd", hint="give an even number")
