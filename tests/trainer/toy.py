"""A small task of the training loop, and what its runs leave, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.log import METRICS
from trainer.loop import STATE, Loop
from trainer.task import Place, Plan, Tensors, Training

ROWS = 11  # a batch of 8 straddles epochs
CPU = Place(torch.device("cpu"), half=False)
Losses = Callable[..., Tensor]


@dataclass
class Toy:
    """A net that learns rows of a table from noised rows, with dropout, and remembers what it read."""

    name: str = "toy"
    dropout: float = 0.2
    seen: list[list[int]] = field(default_factory=list)
    calls: int = 0
    dies_at: int = -1  # call of `losses` that is interrupted

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(5, 8), nn.SiLU(), nn.Dropout(self.dropout), nn.Linear(8, 4, bias=True)
        )
        self.weights = np.array([1.0, 2.0, 0.5] + [1.0] * (ROWS - 3))
        self.table = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))

    def draw(self, count: int, generator: torch.Generator) -> Tensors:
        t = torch.randint(1000, (count,), generator=generator)
        return {"t": t, "eps": torch.randn(count, 4, generator=generator)}

    def read(self, rows: Any) -> Tensors:
        self.seen.append(rows.tolist())
        return {"x": self.table[torch.from_numpy(rows)]}

    def held_out(self) -> Tensors:
        return {"x": self.table[:5]}

    def losses(self, predict: Losses, batch: Tensors, draw: Tensors) -> Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            raise RuntimeError("killed")
        share = draw["t"][:, None] / 1000
        guess = predict(torch.cat([batch["x"] + share * draw["eps"], share], dim=1))
        return (guess - batch["x"]).square().mean(1)

    def figures(self) -> dict[str, float]:
        return {"figure": 1.0}

    def show(self, path: Path) -> None:
        del path

    def save(self, weights: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        self.saved = {name: value.clone() for name, value in weights.items()}


SETTINGS = Training(batch=8, part=2, steps=12, warmup=3, evaluate_every=5, ema=0.9)


def plan(folder: Path, **changes: Any) -> Plan:
    return replace(Plan(folder, SETTINGS, 7, "digest", resume=False, deadline=None), **changes)


def train(folder: Path, task: Toy | None = None, **changes: Any) -> tuple[Toy, Loop]:
    task = task or Toy()
    loop = Loop(task, plan(folder, **changes), CPU, lambda line: None)
    loop.run()
    return task, loop


def state(folder: Path) -> tuple[dict[str, Tensor], int]:
    tensors, scalars = checkpoint.load(folder / STATE)
    return tensors, scalars["step"]


def assert_equal_states(one: Path, other: Path) -> None:
    (a, step_a), (b, step_b) = state(one), state(other)
    assert step_a == step_b and set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name.split(".")[0] for name in a} == {"model", "average", "optimizer"}


def figures(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "mfu", "waiting")} for line in lines]


def trained_rows(task: Toy) -> list[list[int]]:
    """The rows read for steps in order: without the sample that is read to count operations."""
    return [rows for rows in task.seen if len(rows) == 8]
