"""The parts of every network here: time embedding, attention, residual blocks, blur, pixel shuffles.

Tensors in, tensors out. Convolutional parts are laid out as diffusers' unCLIP blocks.
This module knows nothing of noise schedules or conditions.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_PERIOD = 10_000.0
M = TypeVar("M", bound=nn.Module)


def time_features(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t (B,) at `width // 2` frequencies, float32 (B, width). Vaswani et al. 2017, 3.5."""
    half = width // 2
    rates = torch.exp(-math.log(TIME_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Timesteps (B,) as vectors (B, width), by way of `features` sinusoids."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.second(F.silu(self.first(time_features(t, self.features))))
        return out


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a skip; the embedding scales and shifts the second norm (diffusers' ResnetBlock2D).

    `resample` halves ("down") or doubles ("up") both sides, inside the block and on its skip.
    """

    def __init__(
        self, channels: int, out: int, embedding: int, groups: int, dropout: float = 0.0, resample: str = ""
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = norm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * out)
        self.norm2 = norm(groups, out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, channels, H, W), the embedding after its SiLU (B, embedding) -> (B, out, H', W')."""
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        out: Tensor = self.skip(resampled(x, self.resample)) + self.conv2(self.dropout(h))
        return out


class Attention(nn.Module):
    """Positions attend to one another and to context tokens (GLIDE's form, diffusers' added key and value).

    On a grid of more than `keys` a side, where that is not 0, positions are looked at as means of squares of them
    (Wang et al. 2022, "PVT v2", linear spatial reduction).
    """

    def __init__(self, channels: int, head: int, context: int, groups: int, keys: int = 0) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.keys = keys
        self.norm = norm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(context, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (B, channels, H, W), tokens (B, N, context), mask (B, N) true on tokens -> like x."""
        batch, channels, height, width = x.shape
        query, key, value = self._qkv(self.norm(x))
        more_key, more_value = self.context(tokens).chunk(2, dim=2)
        seen = F.pad(mask, (0, key.shape[1]), value=True)[:, None, None]  # (B, 1, 1, N + keys)
        key, value = torch.cat([more_key, key], dim=1), torch.cat([more_value, value], dim=1)
        out = attend(self._split(query), self._split(key), self._split(value), seen)
        joined: Tensor = self.out(out.transpose(1, 2).reshape(batch, height * width, channels))
        return x + joined.transpose(1, 2).reshape(batch, channels, height, width)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H·W, channels) of x (B, channels, H, W), and its keys and values (B, keys, channels)."""
        flat = x.flatten(2).transpose(1, 2)
        square = -(-max(x.shape[2:]) // self.keys) if self.keys else 1
        if square == 1:
            query, key, value = self.qkv(flat).chunk(3, dim=2)
            return query, key, value
        means = F.avg_pool2d(x, square, ceil_mode=True).flatten(2).transpose(1, 2)
        weight, bias, own = self.qkv.weight, self.qkv.bias, x.shape[1]
        key, value = F.linear(means, weight[own:], bias[own:]).chunk(2, dim=2)
        return F.linear(flat, weight[:own], bias[:own]), key, value

    def _split(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        return x.view(batch, length, self.heads, channels // self.heads).transpose(1, 2)


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, channels, H, W), at each position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


def norm(groups: int, channels: int) -> nn.Module:
    """Group norm, or with 0 groups layer norm per position, several times quicker on a CPU in bfloat16."""
    return nn.GroupNorm(groups, channels) if groups else PositionNorm(channels)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, head), `seen` (B, 1, 1 or N, N') true on what a query may look at.

    On a CPU it is written out, which is three times quicker than torch's own for lengths below a few hundred.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=3)
    out: Tensor = shares.to(value.dtype) @ value
    return out


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a GELU layer of four times the width."""

    def __init__(self, width: int, head: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // head
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, width), mask (B, 1, 1 or N, N) true where a row may look -> like x."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = attend(query, key, value, mask)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, width)))
        out: Tensor = x + self.dropout(self.narrow(F.gelu(self.wide(self.norm2(x)))))
        return out


def zeroed(module: M) -> M:
    """The module with weights and biases set to zero, so that it adds nothing at the start."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def resampled(x: Tensor, how: str) -> Tensor:
    """x (B, C, H, W) at half the sides ("down", by means), twice ("up", by repetition), or as it is ("")."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "up" else x


def blur(pictures: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussian blur of (B, C, H, W) with an odd kernel of `size`, edges mirrored; float32 under any autocast."""
    offsets = torch.arange(size, dtype=pictures.dtype, device=pictures.device) - size // 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (line[:, None] * line[None]) / line.sum() ** 2
    channels = pictures.shape[1]
    padded = F.pad(pictures, (size // 2,) * 4, mode="reflect")
    with torch.autocast(pictures.device.type, enabled=False):
        return F.conv2d(padded, kernel.expand(channels, 1, size, size), groups=channels)
