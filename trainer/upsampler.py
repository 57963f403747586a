"""The upsampler: from a small picture to a large one.

A U-Net without attention or text, trained on crops and used on whole pictures. In training the small picture is blurred
and a little noised, so that what a decoder does not draw perfectly does no harm (Ramesh et al. 2022, section 2.3;
blur and kernel of Saharia et al. 2021). This module knows nothing of noise schedules.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.conditions import Sizes
from trainer.diffusion import Parameterisation, Weighting
from trainer.layers import blur
from trainer.unet import UNet, UNetConfig

BLUR_SIZE = 3  # pixels


class UpsamplerConfig(UNetConfig):
    """The upsampler's U-Net, its sizes, and how the small picture is worsened in training."""

    attention: tuple[int, ...] = ()  # sides of the grids that attend: none, so that any size can be drawn
    side: int = Field(default=256, ge=8)  # pixels of the large picture
    crop: int = Field(default=64, ge=8)  # pixels of the crops of it that it is trained on
    factor: int = Field(default=4, ge=2)  # large side over small side
    predicts: Parameterisation = "x0"
    weighting: Weighting = "v"
    blur: float = Field(default=0.6, gt=0, le=1)  # standard deviation in pixels of the small picture's Gaussian blur
    noise: float = Field(default=0.05, ge=0, lt=1)  # largest standard deviation added to the small picture

    @property
    def small(self) -> int:
        """Pixels of the small picture."""
        return self.side // self.factor


class Upsampler(nn.Module):
    """Raw prediction for a noised large picture beside the small one."""

    def __init__(self, config: UpsamplerConfig, sizes: Sizes) -> None:
        super().__init__()
        del sizes  # it sees no text and no vectors
        self.config = config
        self.unet = UNet(config, config.side, 6, 3, 1)

    def forward(self, xt: Tensor, t: Tensor, small: Tensor) -> Tensor:
        """What `config.predicts`, float32 like xt (B, 3, H, W); small is (B, 3, H / factor, W / factor)."""
        large = F.interpolate(small, size=xt.shape[2:], mode="bicubic", align_corners=False).to(xt.dtype)
        nothing = xt.new_zeros(len(xt), self.config.width), xt.new_zeros(len(xt), 1, 1)
        mask = torch.ones(len(xt), 1, dtype=torch.bool, device=xt.device)
        out: Tensor = self.unet(torch.cat([xt, large], dim=1), t, *nothing, mask)
        return out


def shrunk(large: Tensor, factor: int) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] at 1 / factor of their sides, antialiased."""
    size = [side // factor for side in large.shape[2:]]
    return F.interpolate(large, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def worsened(small: Tensor, sigma: float, noise: Tensor, strength: Tensor) -> Tensor:
    """Small pictures (B, C, H, W), blurred by `sigma` pixels, with `strength` (B,) times `noise` (like small) added."""
    return blur(small, BLUR_SIZE, sigma) + strength[:, None, None, None] * noise
