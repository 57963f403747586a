"""The prior: from a text's vector to the vector of a picture that it may describe.

Three kinds with one interface. `linear` is a closed-form ridge regression, the baseline that every other must beat; the
others predict the clean, whitened picture vector from a noised one (Ramesh et al. 2022, section 2.2): a residual
network for small runs and a causal transformer for large ones. This module knows of noise how strong it is, and
nothing of how vectors are sampled.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base import Config
from trainer.conditions import HARDLY, NullText, Sizes, Whitening
from trainer.diffusion import cosine
from trainer.layers import TimeEmbedding, TransformerBlock, zeroed


class PriorConfig(Config):
    """The size of a prior; it predicts x0 and its text is dropped for guidance."""

    kind: Literal["linear", "residual", "transformer"] = "residual"
    width: int = Field(default=512, ge=8)
    depth: int = Field(default=6, ge=1)
    head: int = Field(default=64, ge=1)  # channels per attention head of the transformer
    dropout: float = Field(default=0.0, ge=0, lt=1)
    drop_text: float = Field(default=0.1, ge=0, le=1)  # share of captions replaced by the empty one
    noise_only: float = Field(
        default=0.0, ge=0, le=1
    )  # share of rows at the last noise level: there it answers the mean


class Prior(nn.Module):
    """What every prior has: whitening of both kinds of vectors, and the null text."""

    wants_tokens = False
    guided = True  # whether what a text adds may be exaggerated; a closed form is its own best answer

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.image = Whitening(sizes.embedding)
        self.text = Whitening(sizes.embedding)
        self.null = NullText(sizes)

    def white_text(self, text_emb: Tensor, keep_text: Tensor) -> Tensor:
        """Whitened vectors (B, embedding) of the texts, of the empty one where not kept."""
        out: Tensor = self.text(self.null.replace_embedding(text_emb, keep_text))
        return out

    def forward(
        self, zt: Tensor, t: Tensor, text_emb: Tensor, text_tokens: Tensor, text_mask: Tensor, keep_text: Tensor
    ) -> Tensor:
        """The clean whitened picture vector (B, embedding).

        zt (B, embedding) is noised and whitened, t (B,); text_emb (B, embedding) is the CLIP's; text_tokens
        (B, N, token) and text_mask (B, N) are used where `wants_tokens`; keep_text (B,) is false for the null text.
        """
        raise NotImplementedError


class LinearPrior(Prior):
    """Whitened picture vector = weight · whitened text vector, whatever the noise."""

    guided = False
    weight: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.register_buffer("weight", torch.zeros(sizes.embedding, sizes.embedding))

    def forward(
        self, zt: Tensor, t: Tensor, text_emb: Tensor, text_tokens: Tensor, text_mask: Tensor, keep_text: Tensor
    ) -> Tensor:
        del zt, t, text_tokens, text_mask
        return self.linear(self.white_text(text_emb, keep_text), keep_text)

    def linear(self, white: Tensor, keep_text: Tensor) -> Tensor:
        """The answer to whitened text vectors (B, embedding): where the text is not kept, the mean."""
        out: Tensor = white @ self.weight.T * keep_text[:, None]
        return out


class TextRegression(nn.Module):
    """What a text alone tells beyond a linear map: a residual network over the whitened text vector, 0 at the start."""

    def __init__(self, dimension: int, config: PriorConfig) -> None:
        super().__init__()
        width = config.width
        self.enter = nn.Linear(dimension, width)
        self.wide = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(config.depth))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)
        self.exit = zeroed(nn.Linear(width, dimension))

    def forward(self, text: Tensor) -> Tensor:
        """(B, dimension) -> (B, dimension)."""
        x = self.enter(text)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(self.dropout(F.gelu(wide(normal(x)))))
        out: Tensor = self.exit(normal(x)).float()
        return out


class ResidualPrior(LinearPrior):
    """What the linear prior lacks: a regression from the text, and what a noised vector shows beyond its answer.

    The noised vector is seen as deviation from that answer, on the axes of what the linear prior leaves, or without a
    text those of all vectors. The best linear estimate there (Wiener's) is the start; a network adds to it, steered by
    time and the answer, in units of what the estimate leaves open. (Seeing vector and text as they are, this network
    took its own guesses for evidence while it sampled, and drew nearly the same vector again and again for a text.)

    Both networks add nothing at the start. (Adaptive layer norm: Peebles and Xie 2022.)
    """

    guided = True
    axes: Tensor
    variance: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, sizes: Sizes, config: PriorConfig) -> None:
        super().__init__(sizes)
        width = config.width
        self.register_buffer("axes", torch.eye(sizes.embedding).repeat(2, 1, 1))  # without a text, and with one
        self.register_buffer("variance", torch.ones(2, sizes.embedding))  # of the deviations, along each axis
        schedule = cosine()
        self.register_buffer("alpha", schedule.alpha[:, None], persistent=False)  # (T, 1)
        self.register_buffer("sigma", schedule.sigma[:, None], persistent=False)
        self.regression = TextRegression(sizes.embedding, config)
        self.time = TimeEmbedding(256, width)
        self.enter_noised = nn.Linear(sizes.embedding, width)
        self.enter_answer = nn.Linear(sizes.embedding, width)
        self.wide = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(config.depth))
        self.narrow = nn.ModuleList(zeroed(nn.Linear(2 * width, width)) for _ in range(config.depth))
        self.steer = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(config.depth))
        self.dropout = nn.Dropout(config.dropout)
        self.exit = zeroed(nn.Linear(width, sizes.embedding))

    def fit_axes(self, images: Tensor, left: Tensor) -> None:
        """Take axes and variances from whitened vectors and what the linear prior leaves of them, (N, embedding).

        Axes along which nothing varies, as where vectors are few, are 0: which they are would be left to chance.
        """
        for kept, deviations in enumerate((images.double(), left.double())):
            variance, axes = torch.linalg.eigh(deviations.T @ deviations / len(deviations))
            self.variance[kept].copy_(variance.clamp(min=HARDLY**2))
            self.axes[kept].copy_(axes * (variance > HARDLY**2))

    def forward(
        self, zt: Tensor, t: Tensor, text_emb: Tensor, text_tokens: Tensor, text_mask: Tensor, keep_text: Tensor
    ) -> Tensor:
        white = self.white_text(text_emb, keep_text)
        answer = self.linear(white, keep_text) + self.regression(white)
        alpha, sigma = self.alpha[t], self.sigma[t]
        kept = keep_text.long()
        variance = self.variance[kept]  # (B, embedding)
        spread = (alpha**2 * variance + sigma**2).sqrt()  # of noised deviations, along each axis
        seen = _chosen(zt - alpha * answer, self.axes, kept) / spread
        more = self._more(seen, t, answer) * variance.sqrt() * sigma / spread
        out: Tensor = answer + _chosen(seen * alpha * variance / spread + more, self.axes.mT, kept)
        return out

    def _more(self, seen: Tensor, t: Tensor, answer: Tensor) -> Tensor:
        """What the network adds, in standard deviations of what the linear estimate leaves open; float32."""
        told = normal(self.enter_answer(answer))
        steer = F.silu(self.time(t) + told)
        x = normal(self.enter_noised(seen)) + told  # of equal size, so that noise does not drown the answer
        for steering, wide, narrow in zip(self.steer, self.wide, self.narrow, strict=True):
            scale, shift = steering(steer).chunk(2, dim=1)
            h = normal(x) * (1 + scale) + shift
            x = x + narrow(self.dropout(F.gelu(wide(h))))
        out: Tensor = self.exit(normal(x)).float()
        return out


class TransformerPrior(Prior):
    """The paper's prior: text tokens, text vector, time, noised vector, and a query that answers; all causal."""

    wants_tokens = True

    def __init__(self, sizes: Sizes, config: PriorConfig) -> None:
        super().__init__(sizes)
        width = config.width
        self.time = TimeEmbedding(width, width)
        self.enter_tokens = nn.Linear(sizes.token, width)
        self.enter_text = nn.Linear(sizes.embedding, width)
        self.enter_noised = nn.Linear(sizes.embedding, width)
        self.query_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(sizes.context + 4, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, config.head, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.exit = zeroed(nn.Linear(width, sizes.embedding))

    def forward(
        self, zt: Tensor, t: Tensor, text_emb: Tensor, text_tokens: Tensor, text_mask: Tensor, keep_text: Tensor
    ) -> Tensor:
        tokens, mask = self.null.replace_tokens(text_tokens, text_mask, keep_text)
        text = self.white_text(text_emb, keep_text)
        rest = [self.enter_text(text), self.time(t), self.enter_noised(zt), self.query_embedding.expand(len(zt), -1)]
        places = torch.cat([self.position_embedding[: tokens.shape[1]], self.position_embedding[-4:]])
        x = torch.cat([self.enter_tokens(tokens), *(part[:, None] for part in rest)], dim=1) + places
        length = x.shape[1]
        seen = F.pad(mask, (0, 4), value=True)[:, None, None]  # (B, 1, 1, N)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, seen & causal)
        out: Tensor = self.exit(self.norm(x[:, -1])).float()
        return out


def _chosen(vectors: Tensor, matrices: Tensor, which: Tensor) -> Tensor:
    """Each of vectors (B, D) times the one of matrices (K, D, D) that `which` (B,) says; in float32."""
    with torch.autocast(vectors.device.type, enabled=False):
        return (vectors @ matrices)[which, torch.arange(len(which), device=which.device)]


def normal(x: Tensor) -> Tensor:
    """Rows (B, width) with mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[1:])


def build_prior(config: PriorConfig, sizes: Sizes) -> Prior:
    """A fresh prior, its weights from torch's global generator."""
    match config.kind:
        case "linear":
            return LinearPrior(sizes)
        case "residual":
            return ResidualPrior(sizes, config)
        case "transformer":
            return TransformerPrior(sizes, config)


def better_of(candidates: Tensor, text_emb: Tensor) -> Tensor:
    """Of candidates (K, B, embedding), unit vectors, the one nearest to each text (B, embedding), by dot product."""
    best = (candidates * text_emb).sum(dim=2).argmax(dim=0)
    return candidates[best, torch.arange(len(best), device=best.device)]
