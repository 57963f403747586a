"""Prior, decoder and upsampler as tasks of the training loop: their data, randomness, losses and held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.base import Config
from trainer import diffusion, sampling
from trainer.cascade import DEFAULT, Words, decoder_denoise, decoder_noise, draw, enlarge
from trainer.decoder import Decoder, DecoderConfig
from trainer.pictures import grid, write_png
from trainer.prior import LinearPrior, Prior, PriorConfig, ResidualPrior
from trainer.prior_cosines import prior_cosines
from trainer.ridge import ridge
from trainer.saved import build, save_model
from trainer.sets import Sets, Split
from trainer.task import Tensors
from trainer.upsampler import Upsampler, UpsamplerConfig, shrunk, worsened

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 8  # held-out rows in a grid of samples


class _Task:
    """What the three have in common."""

    name: str

    def __init__(self, config: Config, sets: Sets, folder: Path, seed: int) -> None:
        torch.manual_seed(sampling.seed_for(seed, self.name, "weights"))
        self.model = build(config, sets.sizes)
        self.sets, self.folder = sets, folder
        self.weights = sets.train.embeddings.weight
        self._config = config
        self._schedule = diffusion.cosine()

    @cached_property
    def _held(self) -> Tensors:
        return self._read(self.sets.val, self.sets.val.rows)

    def read(self, rows: NDArray[np.int64]) -> Tensors:
        """Training rows as tensors on the CPU."""
        return self._read(self.sets.train, rows)

    def held_out(self) -> Tensors:
        """The held-out rows, read once."""
        return self._held

    def save(self, weights: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the model with these weights."""
        save_model(self.folder, self._config, self.sets.sizes, weights, facts)

    def figures(self) -> dict[str, float]:
        """No figures beside the losses."""
        return {}

    def show(self, path: Path) -> None:
        """Nothing to see."""

    def _read(self, split: Split, rows: NDArray[np.int64]) -> Tensors:
        raise NotImplementedError

    def _on(self, device: torch.device) -> diffusion.Schedule:
        if self._schedule.alpha.device != device:
            self._schedule = self._schedule.to(device)
        return self._schedule

    def _times(self, count: int, generator: torch.Generator, middle: float = 0.0) -> Tensor:
        """One timestep from each of `count` equally likely parts of the schedule, in random order.

        The loss of a batch varies less so (Kingma et al. 2021, "Variational diffusion models", appendix I). Each is as
        likely as any other, but for the share of `middle`, which is logit-normal (Esser et al. 2024, "Scaling
        rectified flow transformers", section 3.1).
        """
        order = torch.randperm(count, generator=generator, device=generator.device)
        shift = torch.rand(1, generator=generator, device=generator.device)
        share = (order + shift) / count
        if middle:
            chosen = torch.rand(count, generator=generator, device=generator.device) < middle
            share = torch.where(chosen, torch.special.ndtri(share).sigmoid(), share)
        return (share * len(self._schedule)).long().clamp(max=len(self._schedule) - 1)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(iter(self.model.state_dict().values())).device
        return device


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _kept(count: int, dropped: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) >= dropped


class PriorTask(_Task):
    """Noised, whitened picture vectors and their texts; plain squared error of the clean vector."""

    name = "prior"

    def __init__(self, config: PriorConfig, sets: Sets, folder: Path, seed: int) -> None:
        super().__init__(config, sets, folder, seed)
        self.config = config
        self.prior = cast("Prior", self.model)
        images, texts = sets.some("image"), sets.some("text")
        self.prior.image.fit(images)
        self.prior.text.fit(texts)
        self.prior.null.fit(*sets.null)
        white = self.prior.image(images)
        self._weight, left = ridge(self.prior.text(texts), white)
        if isinstance(self.model, LinearPrior):
            self.model.weight.copy_(self._weight)
        if isinstance(self.model, ResidualPrior):
            self.model.fit_axes(white, left)

    def draw(self, count: int, generator: torch.Generator) -> Tensors:
        eps = _normal((count, self.sets.sizes.embedding), generator)
        keep = _kept(count, self.config.drop_text, generator)
        noise_only = torch.rand(count, generator=generator, device=generator.device) < self.config.noise_only
        t = self._times(count, generator).masked_fill(noise_only, len(self._schedule) - 1)
        return {"t": t, "eps": eps, "keep_text": keep}

    def losses(self, predict: Callable[..., Tensor], batch: Tensors, draw: Tensors) -> Tensor:
        schedule = self._on(draw["t"].device)
        x0 = self.prior.image(batch["image"])
        zt = diffusion.add_noise(schedule, x0, draw["t"], draw["eps"])
        guess = predict(zt, draw["t"], batch["text"], batch["tokens"], batch["mask"], draw["keep_text"])
        return diffusion.loss(schedule, "x0", "uniform", guess, x0, draw["eps"], draw["t"])

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Mean cosines of the held-out rows, as `prior_cosines` tells them."""
        device = self._device
        batch = {name: value.to(device) for name, value in self.held_out().items()}
        words = Words(batch["text"], batch["tokens"], batch["mask"])
        linear = self.prior.text(words.vectors) @ self._weight.T.to(device)
        simpler = {
            "mean": self.prior.image.mean.expand_as(linear),  # the mean training vector, whatever the text
            "linear": self.prior.image.inverse(linear),
        }
        cosines = prior_cosines(self.prior, words, batch["image"], simpler, 0, DEFAULT)
        return {f"cosine/{name}": value for name, value in cosines.items()}

    def _read(self, split: Split, rows: NDArray[np.int64]) -> Tensors:
        if self.prior.wants_tokens:
            tokens, mask = split.tokens.take(rows)
        else:
            tokens, mask = torch.zeros(len(rows), 0, 1), torch.zeros(len(rows), 0, dtype=torch.bool)
        return {
            "image": split.vectors("image", rows),
            "text": split.vectors("text", rows),
            "tokens": tokens,
            "mask": mask,
        }


class DecoderTask(_Task):
    """Noised small pictures under the vectors and captions that the set has for them."""

    name = "decoder"

    def __init__(self, config: DecoderConfig, sets: Sets, folder: Path, seed: int) -> None:
        super().__init__(config, sets, folder, seed)
        self.config = config
        self.decoder = cast("Decoder", self.model)
        self.decoder.image.fit(sets.some("image"))
        self.decoder.null.fit(*sets.null)
        self._pictures = {split: split.pictures(config.side) for split in (sets.train, sets.val)}

    def draw(self, count: int, generator: torch.Generator) -> Tensors:
        return {
            "t": self._times(count, generator, self.config.middle),
            "eps": _normal((count, 3, self.config.side, self.config.side), generator),
            "keep_image": _kept(count, self.config.drop_image, generator),
            "keep_text": _kept(count, self.config.drop_text, generator),
        }

    def losses(self, predict: Callable[..., Tensor], batch: Tensors, draw: Tensors) -> Tensor:
        schedule = self._on(draw["t"].device)
        x0 = as_floats(batch["picture"])
        xt = diffusion.add_noise(schedule, x0, draw["t"], draw["eps"])
        known = batch["image"], batch["tokens"], batch["mask"]
        guess = predict(xt, draw["t"], *known, draw["keep_image"], draw["keep_text"])
        c = self.config
        edges = c.edges if self.model.training else 0.0  # held-out losses are of the pixels alone
        return diffusion.loss(schedule, c.predicts, c.weighting, guess, x0, draw["eps"], draw["t"], edges=edges)

    @torch.no_grad()
    def show(self, path: Path) -> None:
        """Held-out pictures, and what is drawn of their own vectors and captions."""
        device = self._device
        batch = {name: value[:SHOWN].to(device) for name, value in self.held_out().items()}
        words = Words(batch["image"], batch["tokens"], batch["mask"])  # its vectors are the prior's, not used here
        denoise = decoder_denoise(self.decoder, batch["image"], words, DEFAULT)
        drawn = draw(denoise, decoder_noise(self.decoder, range(len(batch["picture"])), device), DEFAULT)
        write_grid(path, {"true": as_floats(batch["picture"]), "drawn": drawn})

    def _read(self, split: Split, rows: NDArray[np.int64]) -> Tensors:
        tokens, mask = split.tokens.take(rows)
        vectors = split.vectors("image", rows)
        return {"picture": self._pictures[split].take(rows), "image": vectors, "tokens": tokens, "mask": mask}


class UpsamplerTask(_Task):
    """Crops of large pictures, noised, beside the same crops of small ones, worsened."""

    name = "upsampler"

    def __init__(self, config: UpsamplerConfig, sets: Sets, folder: Path, seed: int) -> None:
        super().__init__(config, sets, folder, seed)
        self.config = config
        self.upsampler = cast("Upsampler", self.model)
        self._pictures = {split: split.pictures(config.side) for split in (sets.train, sets.val)}

    def draw(self, count: int, generator: torch.Generator) -> Tensors:
        c = self.config
        places = (c.side - c.crop) // c.factor + 1
        device = generator.device
        return {
            "t": self._times(count, generator),
            "eps": _normal((count, 3, c.crop, c.crop), generator),
            "noise": _normal((count, 3, c.crop // c.factor, c.crop // c.factor), generator),
            "strength": c.noise * torch.rand(count, generator=generator, device=device),
            "place": torch.randint(places, (count, 2), generator=generator, device=device),
        }

    def losses(self, predict: Callable[..., Tensor], batch: Tensors, draw: Tensors) -> Tensor:
        schedule, c = self._on(draw["t"].device), self.config
        whole = as_floats(batch["picture"])
        x0 = crops(whole, draw["place"] * c.factor, c.crop)
        small = crops(shrunk(whole, c.factor), draw["place"], c.crop // c.factor)
        small = worsened(small, c.blur, draw["noise"], draw["strength"])
        xt = diffusion.add_noise(schedule, x0, draw["t"], draw["eps"])
        guess = predict(xt, draw["t"], small)
        return diffusion.loss(schedule, c.predicts, c.weighting, guess, x0, draw["eps"], draw["t"])

    @torch.no_grad()
    def show(self, path: Path) -> None:
        """Held-out pictures, small, and enlarged again."""
        true = as_floats(self.held_out()["picture"][:SHOWN].to(self._device))
        small = shrunk(true, self.config.factor)
        drawn = enlarge(self.upsampler, small, range(len(true)), DEFAULT)
        write_grid(path, {"true": true, "small": small, "enlarged": drawn})

    def _read(self, split: Split, rows: NDArray[np.int64]) -> Tensors:
        return {"picture": self._pictures[split].take(rows)}


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 (…) as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def as_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    """Float pictures (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3)."""
    grey = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    out: NDArray[np.uint8] = grey.permute(0, 2, 3, 1).cpu().numpy()
    return out


def crops(pictures: Tensor, place: Tensor, side: int) -> Tensor:
    """Squares (B, C, side, side) of pictures (B, C, H, W), whose top left corners are `place` (B, 2): row, column."""
    along = torch.arange(side, device=pictures.device)
    rows, columns = (place[:, axis, None] + along for axis in (0, 1))  # (B, side)
    many = torch.arange(len(pictures), device=pictures.device)[:, None, None]
    cut = pictures.permute(0, 2, 3, 1)[many, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def write_grid(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write pictures (B, 3, H, W), a labelled row each, as one PNG."""
    sheet = grid([list(as_bytes(row)) for row in rows.values()], list(rows))
    write_png(path, sheet, {})
