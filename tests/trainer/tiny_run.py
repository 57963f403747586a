"""What fitting is asked for in tests: three networks that take a second, over any packed set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.base import parse_config
from trainer.fit import FitRun, RunConfig

TRAINING = {"batch": 8, "part": 4, "steps": 3, "warmup": 1, "evaluate_every": 2}
UNET = {"channels": [16, 32], "blocks": 1, "groups": 8, "head": 16, "patch": 2}
PRIOR = {"width": 32, "depth": 1, "training": TRAINING}
TINY = {
    "prior": PRIOR,
    "decoder": {**UNET, "side": 16, "attention": [4], "token_width": 24, "dropout": 0.1, "training": TRAINING},
    "upsampler": {**UNET, "side": 32, "factor": 2, "crop": 16, "training": TRAINING},
}


def silent(line: str) -> None:
    del line


def run(shards: Path, out: Path, **changes: object) -> FitRun:
    return replace(FitRun(shards, out, parse_config(RunConfig, TINY, "tiny")), **changes)  # type: ignore[arg-type]
