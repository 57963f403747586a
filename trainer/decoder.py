"""The decoder: from a picture's CLIP vector and a caption's token states to a small picture.

A U-Net on pixels. The picture vector is added to the time embedding and stands as extra tokens beside the caption's,
which every attention sees (Ramesh et al. 2022, section 2.1); the caption's end state joins the time embedding too.
Each condition can be replaced by its null: a learned vector, and the empty text. This module knows nothing of noise
schedules, prompts or CLIPs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.conditions import NullText, Sizes, Whitening, end_states
from trainer.diffusion import Parameterisation, Weighting
from trainer.unet import UNet, UNetConfig


class DecoderConfig(UNetConfig):
    """The decoder's U-Net, what it predicts, and how often its conditions are dropped."""

    side: int = Field(default=64, ge=4)  # pixels
    predicts: Parameterisation = "x0"
    weighting: Weighting = "v"
    edges: float = Field(default=0.0, ge=0)  # in training, weight of the differences of neighbours beside the pixels
    middle: float = Field(default=0.0, ge=0, le=1)  # share of timesteps that are logit-normal; the others are uniform
    image_tokens: int = Field(default=4, ge=1)  # tokens made of the picture vector
    token_width: int = Field(default=256, ge=8)  # of the tokens that attention sees
    drop_image: float = Field(default=0.1, ge=0, le=1)  # share of picture vectors replaced by the null
    drop_text: float = Field(default=0.5, ge=0, le=1)  # share of captions replaced by the empty one


class Decoder(nn.Module):
    """Raw prediction for a noised picture under two conditions."""

    def __init__(self, config: DecoderConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.image = Whitening(sizes.embedding)
        self.null = NullText(sizes)
        self.null_embedding = nn.Parameter(torch.zeros(sizes.embedding))  # of the picture, whitened
        self.image_vector = nn.Linear(sizes.embedding, config.width)
        self.image_tokens = nn.Linear(sizes.embedding, config.image_tokens * config.token_width)
        self.text_vector = nn.Linear(sizes.token, config.width)
        self.text_tokens = nn.Linear(sizes.token, config.token_width)
        self.text_norm = nn.LayerNorm(config.token_width)
        self.unet = UNet(config, config.side, 3, 3, config.token_width)

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
        """What `config.predicts`, float32 (B, 3, side, side).

        xt (B, 3, side, side); t (B,); image_emb (B, embedding), the CLIP's unit vectors; text_tokens (B, N, token)
        and text_mask (B, N), true on tokens; keep_image and keep_text (B,), false for the null.
        """
        image = torch.where(keep_image[:, None], self.image(image_emb), self.null_embedding)
        tokens, mask = self.null.replace_tokens(text_tokens, text_mask, keep_text)
        vector = self.image_vector(image) + self.text_vector(end_states(tokens, mask))
        extra = self.image_tokens(image).view(len(image), self.config.image_tokens, self.config.token_width)
        text = self.text_norm(self.text_tokens(tokens))
        seen = nn.functional.pad(mask, (self.config.image_tokens, 0), value=True)
        out: Tensor = self.unet(xt, t, vector, torch.cat([extra, text.to(extra.dtype)], dim=1), seen)
        return out
