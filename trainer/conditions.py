"""What prior and decoder share about their conditions: sizes, whitening, text tokens and their null."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.base import Config

HARDLY = 1e-4  # standard deviation of a dimension of unit vectors that is rounding


class Sizes(Config):
    """What a CLIP fixes about the networks that are conditioned on it."""

    embedding: int = Field(ge=1)  # length of its vectors
    token: int = Field(ge=1)  # width of its text token states
    context: int = Field(ge=2)  # tokens per text
    null: int = Field(ge=1)  # tokens of the empty text, both end marks included


class Whitening(nn.Module):
    """Vectors as deviations from a stored mean, in units of a stored standard deviation, dimension by dimension."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, vectors: Tensor) -> None:
        """Take mean and deviation from vectors (N, width); a dimension that hardly varies keeps a unit."""
        std, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > HARDLY, std, 1.0))

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors (…, width), whitened."""
        return (vectors.float() - self.mean) / self.std

    def inverse(self, white: Tensor) -> Tensor:
        """The vectors that `forward` makes `white`."""
        return white * self.std + self.mean


class NullText(nn.Module):
    """The empty text as the CLIP encodes it, which stands for a dropped caption."""

    embedding: Tensor
    tokens: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(sizes.embedding))
        self.register_buffer("tokens", torch.zeros(sizes.null, sizes.token))

    def fit(self, embedding: Tensor, tokens: Tensor) -> None:
        """Take the vector (embedding,) and the token states (null, token) of the empty text."""
        self.embedding.copy_(embedding)
        self.tokens.copy_(tokens)

    def replace_tokens(self, tokens: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, token) and mask (B, N), the empty text's where not `keep` (B,); N is at least `null`."""
        room = tokens.shape[1] - len(self.tokens)
        null = nn.functional.pad(self.tokens, (0, 0, 0, room))
        real = torch.arange(tokens.shape[1], device=mask.device) < len(self.tokens)
        return torch.where(keep[:, None, None], tokens.float(), null), torch.where(keep[:, None], mask, real)

    def replace_embedding(self, embedding: Tensor, keep: Tensor) -> Tensor:
        """Vectors (B, embedding), the empty text's where not `keep` (B,)."""
        return torch.where(keep[:, None], embedding.float(), self.embedding)


def end_states(tokens: Tensor, mask: Tensor) -> Tensor:
    """The state (B, token) at the last true place of `mask` (B, N): the end mark, which has seen the whole text."""
    last = mask.sum(dim=1) - 1
    return tokens[torch.arange(len(tokens), device=tokens.device), last]
