"""One run of `trainer clip`: what it is asked for, where its state lies, and what must be equal to continue it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.base import REFUSED, HeadraceError, digest, file_sha256
from trainer import checkpoint
from trainer.clip_files import WEIGHTS
from trainer.config import ClipConfig

if TYPE_CHECKING:
    from pipeline.clip import Clip

STATE = "training/state.safetensors"
LOGS = "training"


@dataclass(frozen=True)
class Run:
    """What one call of `trainer clip` is asked for."""

    shards: tuple[Path, ...]
    out: Path
    config: ClipConfig
    seed: int
    resume: bool
    minutes: float | None  # stop after this long, with a state to resume from
    start_from: str | None = None  # the CLIP whose weights come first; without one they are drawn from the seed
    lexicon: Path | None = None  # what words are kinds of, for the words that are read off picture vectors

    @property
    def command(self) -> str:
        """What a model card says the CLIP was made by, with its config beside as `recipe.json`."""
        shards = [f"--shards {shlex.quote(str(folder))}" for folder in self.shards]
        command = f"trainer clip {' '.join(shards)} --config recipe.json --seed {self.seed}"
        command += f" --lexicon {shlex.quote(str(self.lexicon))}" if self.lexicon is not None else ""
        command += f" --start-from {shlex.quote(self.start_from)}" if self.start_from is not None else ""
        return command


def run_digest(run: Run, first: Clip | None) -> str:
    """What must be equal for a state to be continued: config, seed, first weights, lexicon, and the sets by their
    description."""
    sets = [json.loads((folder / "dataset.json").read_text(encoding="utf-8")) for folder in run.shards]
    begun = {} if first is None else {"start_from": {**first.identity, "name": ""}}
    words = {} if run.lexicon is None else {"lexicon": file_sha256(run.lexicon)}
    return digest({"config": run.config.model_dump(mode="json"), "seed": run.seed, "sets": sets, **begun, **words})


def check_out(run: Run) -> None:
    """Raise where `run.out` holds what the run would overwrite, or nothing of what it is to continue."""
    if not run.resume and (run.out / WEIGHTS).is_file() and not (run.out / STATE).is_file():
        raise HeadraceError(f"{run.out} already holds a CLIP", hint="give another --out", code=REFUSED)
    there = (run.out / STATE).is_file()
    if run.resume and not there:
        raise HeadraceError(f"there is nothing to resume in {run.out}", hint="leave out --resume", code=REFUSED)
    if there and not run.resume:
        hint = "add --resume to continue it, or give another --out"
        raise HeadraceError(f"{run.out} already holds a run", hint=hint, code=REFUSED)


def check_lexicon(run: Run) -> None:
    """Raise where there is a lexicon and nothing to do with it."""
    if run.lexicon is not None and not run.config.training.readout_steps:
        hint = "give a config with `training.readout_steps`, or leave --lexicon out"
        raise HeadraceError("a lexicon is for words read off pictures, and the config asks for none", hint=hint)


def check_same(run: Run, signature: str) -> None:
    """Raise unless the state in `run.out` is of this config, seed and sets; nothing was written yet."""
    if checkpoint.scalars(run.out / STATE)["run"] != signature:
        raise HeadraceError(
            f"{run.out} was trained with another config, seed, sets, lexicon or first weights",
            hint="give the same --config, --seed, --shards, --lexicon and --start-from, or another --out",
            code=REFUSED,
        )
