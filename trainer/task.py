"""What the training loop asks of a model and its data, and what is asked of the loop. It trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.base import Config
from trainer.optim import Decay

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tensors = dict[str, Tensor]


class Training(Config):
    """How one model is trained. Rates are per step of `batch` samples."""

    batch: int = Field(default=128, ge=1)
    part: int = Field(default=128, ge=1)  # samples that a process takes at once; the rest of the batch is accumulated
    steps: int = Field(default=1000, ge=1)  # in which the rates fall to 0; --max-minutes may end a call before them
    epochs: float | None = Field(default=None, gt=0)  # passes through the set at most, where that is fewer steps
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(default=1e-3, gt=0)  # of embeddings, vectors and scalars; of everything with adamw
    matrix_rate: float = Field(default=1.5e-3, gt=0)  # of matrices and kernels, by Muon
    warmup: int = Field(default=100, ge=0)
    decay: Decay = "cosine"  # of the rates, after the warm-up
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.9995, ge=0, lt=1)  # largest decay of the running average, reached by a warm-up
    compile: bool = False  # by torch.compile: pays on a GPU
    evaluate_every: int = Field(default=500, ge=1)

    def on(self, rows: int) -> Training:
        """The same for a set of so many rows: `epochs` may leave fewer steps, of which a tenth at most is warm-up."""
        steps = self.steps if self.epochs is None else min(self.steps, math.ceil(self.epochs * rows / self.batch))
        warmup = self.warmup if steps == self.steps else min(self.warmup, steps // 10)
        return self.model_copy(update={"steps": steps, "warmup": warmup})


class Task(Protocol):
    """What the loop needs to know of a model and its data."""

    name: str
    model: nn.Module
    weights: NDArray[Any]  # of the training rows

    def draw(self, count: int, generator: torch.Generator) -> Tensors:
        """The randomness of `count` samples, `t` (count,) among it, on the generator's device."""

    def read(self, rows: NDArray[Any]) -> Tensors:
        """Training rows as tensors on the CPU; on a GPU called in another thread."""

    def held_out(self) -> Tensors:
        """The held-out rows, in the form of `read`."""

    def losses(self, predict: Callable[..., Tensor], batch: Tensors, draw: Tensors) -> Tensor:
        """Loss of each sample (B,)."""

    def figures(self) -> dict[str, float]:
        """Held-out figures of the model as it stands, beside the losses."""

    def show(self, path: Path) -> None:
        """Write samples of the model as it stands, where there is something to see."""

    def save(self, weights: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the model with these weights."""


@dataclass(frozen=True)
class Place:
    """Where and as which of how many processes a loop runs, in which precision."""

    device: torch.device
    half: bool
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Plan:
    """What one call of the loop is asked for: `digest` must be equal for a state to be continued."""

    folder: Path
    training: Training
    seed: int
    digest: str
    resume: bool
    deadline: float | None  # of time.monotonic(): stop there, with a state to resume from


def cut(tensors: Tensors, part: slice) -> Tensors:
    """These rows of every tensor."""
    return {name: value[part] for name, value in tensors.items()}
