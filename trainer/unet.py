"""The U-Net of decoder and upsampler: pictures, a vector and tokens in, pictures out.

The order of blocks is that of diffusers' UNet2DConditionModel with `SimpleCrossAttn` and `Resnet` blocks, which the
released unCLIP models use. Where `patch` is more than 1, pixels are folded into channels first (pixel-unshuffle), so
all work is done on a coarser grid. This module knows nothing of noise or of what the vector and the tokens mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base import Config
from trainer.layers import Attention, ResidualBlock, TimeEmbedding, norm, resampled, zeroed


class UNetConfig(Config):
    """The size of a U-Net; a level has half the sides of the one before it."""

    channels: tuple[int, ...] = Field(default=(64, 128, 192, 256), min_length=1)  # per level, finest first
    blocks: int = Field(default=2, ge=1)  # residual blocks per level on the way down; one more on the way up
    attention: tuple[int, ...] = (32, 16, 8)  # sides of the grids that attend, in cells after `patch`
    head: int = Field(default=64, ge=1)  # channels per attention head
    keys: int = Field(default=0, ge=0)  # side of the grid that is looked at, at most: a larger one as means; 0 for any
    groups: int = Field(default=32, ge=0)  # of every group norm, dividing all channels; 0 for layer norm per position
    patch: int = Field(default=1, ge=1)  # pixels folded into one grid cell, per side
    resample: Literal["block", "plain"] = "block"  # between levels: a residual block, or means and repetition alone
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def width(self) -> int:
        """Length of the embedding that steers every block."""
        return 4 * self.channels[0]

    @property
    def multiple(self) -> int:
        """What a picture's sides must be multiples of."""
        return int(self.patch * 2 ** (len(self.channels) - 1))


class Level(nn.Module):
    """Blocks of one resolution, with attention after each where `attend`, and the block that leaves for the next."""

    def __init__(
        self, config: UNetConfig, sides: list[tuple[int, int]], attend: bool, context: int, leave: str
    ) -> None:
        super().__init__()
        out = sides[-1][1]
        make = {"embedding": config.width, "groups": config.groups, "dropout": config.dropout}
        self.blocks = nn.ModuleList(ResidualBlock(a, b, **make) for a, b in sides)  # type: ignore[arg-type]
        self.attention = nn.ModuleList(
            Attention(out, config.head, context, config.groups, config.keys) for _ in (sides if attend else ())
        )
        self.leave: ResidualBlock | None = None
        if leave and config.resample == "block":
            self.leave = ResidualBlock(out, out, resample=leave, **make)  # type: ignore[arg-type]
        self._plain = leave if config.resample == "plain" else ""

    def forward(self, x: Tensor, skips: list[Tensor], steer: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """What stands after every block; before each, `x` is joined by the last of `skips` while there are any."""
        vector, tokens, mask = steer
        states = []
        for number, block in enumerate(self.blocks):
            x = block(torch.cat([x, skips.pop()], dim=1) if skips else x, vector)
            if len(self.attention):
                x = self.attention[number](x, tokens, mask)
            states.append(x)
        if self.leave is not None:
            return [*states, self.leave(x, vector)]
        return [*states, resampled(x, self._plain)] if self._plain else states


class UNet(nn.Module):
    """Raw prediction (B, out, H, W) for pictures (B, channels, H, W)."""

    def __init__(self, config: UNetConfig, side: int, channels: int, out: int, context: int) -> None:
        super().__init__()
        self.config = config
        levels = list(config.channels)
        grids = [side // config.patch // 2**number for number in range(len(levels))]
        folded = config.patch**2
        self.time = TimeEmbedding(levels[0], config.width)
        self.enter = nn.Conv2d(channels * folded, levels[0], 3, padding=1)
        skips = [levels[0]]
        self.down = nn.ModuleList()
        for number, (grid, width) in enumerate(zip(grids, levels, strict=True)):
            last = number == len(levels) - 1
            sides = [(skips[-1], width)] + [(width, width)] * (config.blocks - 1)
            leave = "" if last else "down"
            self.down.append(Level(config, sides, grid in config.attention, context, leave))
            skips += [width] * (config.blocks + (not last))
        deep, attend = levels[-1], grids[-1] in config.attention
        self.middle = Level(config, [(deep, deep)], attend, context, "")
        self.after = Level(config, [(deep, deep)], False, context, "")
        self.up = nn.ModuleList()
        width_in = deep
        for number in reversed(range(len(levels))):
            sides = []
            for _ in range(config.blocks + 1):
                sides.append((width_in + skips.pop(), levels[number]))
                width_in = levels[number]
            leave = "up" if number else ""
            self.up.append(Level(config, sides, grids[number] in config.attention, context, leave))
        self.norm = norm(config.groups, levels[0])
        self.exit = zeroed(nn.Conv2d(levels[0], out * folded, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, vector: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (B, channels, H, W), t (B,), vector (B, width), tokens (B, N, context), mask (B, N) true on tokens."""
        patch = self.config.patch
        steer = F.silu(self.time(t) + vector), tokens, mask
        x = self.enter(F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], [], steer)
        x = skips[-1]
        for level in (self.middle, self.after):
            (x,) = level(x, [], steer)
        for level in self.up:
            *_, x = level(x, skips, steer)
        folded = self.exit(F.silu(self.norm(x)))
        return F.pixel_shuffle(folded, patch).float()
