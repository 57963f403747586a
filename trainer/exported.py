"""The run as a pipeline of diffusers: `trainer export` copies this file, and what it imports, into its directory.

There it needs torch, numpy, pillow, diffusers and transformers, and nothing of the trainer. It draws with the trainer's
own samplers, so that a prompt and a seed give, to a grey level, the picture that `trainer sample --best-of 1` draws. No
module of the trainer imports it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_ftfy_available, logging
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from trainer.cascade import DEFAULT, How, Words, decoder_denoise, decoder_noise, draw, enlarge, imagine
from trainer.conditions import Sizes
from trainer.decoder import Decoder, DecoderConfig
from trainer.prior import PriorConfig, build_prior
from trainer.sampling import seed_for
from trainer.upsampler import Upsampler, UpsamplerConfig

logger = logging.get_logger(__name__)


class Network(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One of the trainer's networks, with its settings in config.json and its weights beside it."""

    network: nn.Module

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the network predicts."""
        out: Tensor = self.network(*inputs)
        return out


class PriorNetwork(Network):
    """From a text's vector to a picture's."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, settings: dict[str, Any], sizes: dict[str, Any]) -> None:
        super().__init__()
        self.network = build_prior(PriorConfig(**settings), Sizes(**sizes))


class DecoderNetwork(Network):
    """From a picture's vector and a text to a small picture."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, settings: dict[str, Any], sizes: dict[str, Any]) -> None:
        super().__init__()
        self.network = Decoder(DecoderConfig(**settings), Sizes(**sizes))


class UpsamplerNetwork(Network):
    """From a small picture to a large one."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, settings: dict[str, Any], sizes: dict[str, Any]) -> None:
        super().__init__()
        self.network = Upsampler(UpsamplerConfig(**settings), Sizes(**sizes))


class HeadracePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to picture: prior, decoder, upsampler."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        prior: PriorNetwork,
        decoder: DecoderNetwork,
        upsampler: UpsamplerNetwork,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, prior=prior, decoder=decoder, upsampler=upsampler
        )

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        prior_num_inference_steps: int = DEFAULT.prior_steps,
        decoder_num_inference_steps: int = DEFAULT.steps,
        super_res_num_inference_steps: int = DEFAULT.large_steps,
        prior_guidance_scale: float = DEFAULT.prior_guidance,
        decoder_guidance_scale: float = DEFAULT.image_guidance,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture per prompt and seed; a single one of either goes with all of the other.

        `output_type` is "pil", or "np" for float (N, S, S, 3) in [0, 1]. Arguments are named as in UnCLIPPipeline.

        Raises:
            ValueError: a prompt longer than the CLIP's context, or unequal numbers of prompts and seeds.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if len(prompts) == 1:
            prompts *= len(seeds)
        if len(seeds) == 1:
            seeds *= len(prompts)
        if len(prompts) != len(seeds):
            raise ValueError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
        how = How(
            prior_steps=prior_num_inference_steps,
            steps=decoder_num_inference_steps,
            large_steps=super_res_num_inference_steps,
            prior_guidance=prior_guidance_scale,
            image_guidance=decoder_guidance_scale,
            text_guidance=decoder_guidance_scale,
        )
        large = self._draw(self.words(prompts), [seed_for(one, 0) for one in seeds], how)
        levels = ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return ImagePipelineOutput(levels.astype(np.float32) / 255)
        return ImagePipelineOutput([Image.fromarray(one) for one in levels])

    def words(self, prompts: Sequence[str]) -> Words:
        """Prompts as conditions."""
        room = self.text_encoder.config.max_position_embeddings
        texts = [_clean(prompt) for prompt in prompts]
        if not is_ftfy_available() and not all(text.isascii() for text in texts):
            logger.warning("a prompt is not plain ASCII: `pip install ftfy` to clean it as in training")
        for text, ids in zip(texts, self.tokenizer(texts).input_ids, strict=True):
            if len(ids) > room:
                raise ValueError(f"the prompt “{text[:40]}” has {len(ids)} tokens, the CLIP reads {room}")
        inputs = self.tokenizer(texts, padding="max_length", max_length=room, return_tensors="pt")
        device = self.text_encoder.device
        half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with half:  # as the trainer runs its CLIP
            out = self.text_encoder(input_ids=inputs.input_ids.to(device))
        vectors = F.normalize(out.text_embeds.float(), dim=-1)
        return Words(vectors, out.last_hidden_state.float(), inputs.attention_mask.to(device).bool())

    def _draw(self, words: Words, seeds: Sequence[int], how: How) -> Tensor:
        """Pictures (N, 3, S, S) in [-1, 1]."""
        decoder = self.decoder.network
        vectors = imagine(self.prior.network, words, seeds, how)
        denoise = decoder_denoise(decoder, vectors, words, how)
        small = draw(denoise, decoder_noise(decoder, seeds, vectors.device), how)
        return enlarge(self.upsampler.network, small, seeds, how)


def _clean(text: str) -> str:
    """A text as open_clip cleans it before its tokenizer; without ftfy, what ftfy would mend stays as it is."""
    mend = import_module("ftfy").fix_text if is_ftfy_available() else str
    return " ".join(html.unescape(html.unescape(mend(text))).split()).lower()
