"""Trains prior, decoder and upsampler in turn, from one packed set and one config, into one run folder.

It checks what it is given, starts the processes' group where `torchrun` did, and hands each model to the one loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import REFUSED, Config, HeadraceError, digest, read_json, read_toml, write_toml
from trainer import saved
from trainer.data import check_tars
from trainer.decoder import DecoderConfig
from trainer.embedded import check_identity
from trainer.log import Log
from trainer.loop import STATE, Loop, check_batch, is_done, is_late
from trainer.prior import PriorConfig
from trainer.processes import any_process, processes
from trainer.saved import NAMES, Name, write_run
from trainer.sets import Sets, Split
from trainer.sizes import check_sizes, misfit
from trainer.task import Place, Plan, Training
from trainer.tasks import DecoderTask, PriorTask, UpsamplerTask
from trainer.upsampler import UpsamplerConfig

if TYPE_CHECKING:
    import torch

    from pipeline.clip import Clip

RESOLVED = "config.toml"
Say = Callable[[str], None]


class PriorRun(PriorConfig):
    """The prior and how it is trained."""

    training: Training = Training()


class DecoderRun(DecoderConfig):
    """The decoder and how it is trained."""

    training: Training = Training()


class UpsamplerRun(UpsamplerConfig):
    """The upsampler and how it is trained."""

    training: Training = Training()


class DataConfig(Config):
    """What of the set is used."""

    held_out: int = Field(default=256, ge=1)  # rows of `val` that losses and figures are computed on


class RunConfig(Config):
    """A run's TOML: what is trained, and on what."""

    data: DataConfig = DataConfig()
    prior: PriorRun = PriorRun()
    decoder: DecoderRun = DecoderRun()
    upsampler: UpsamplerRun = UpsamplerRun()


@dataclass(frozen=True)
class FitRun:
    """What one call of `trainer fit` is asked for."""

    shards: Path
    out: Path
    config: RunConfig
    seed: int = 0
    clip: str | None = None  # as `pipeline.clip.load` takes it; None for the one that the set names
    only: tuple[Name, ...] = field(default=NAMES)
    resume: bool = False
    minutes: float | None = None  # stop after this long, with states to resume from


def fit(run: FitRun, say: Say) -> bool:
    """Train what is asked for; True when all of it is done, False when the time was up before.

    Raises:
        HeadraceError: a set that cannot be trained on or of another CLIP, an `out` that holds another run.
        KeyboardInterrupt: asked to end; the state is saved.
    """
    deadline = None if run.minutes is None else time.monotonic() + 60 * run.minutes
    _check(run)
    with processes() as place:
        say = say if place.leads else _silent
        clip_name, clip = _clip(run, place.device)
        sets = Sets(Split(run.shards, "train", clip), Split(run.shards, "val", clip, run.config.data.held_out), clip)
        check_identity(run.shards, clip)
        _check_same_clip(run.out, clip)
        if len(sets.train.rows) < 2:
            hint = "pack at least two samples with vectors"
            raise HeadraceError(f"{run.shards} has only one sample to train on", hint=hint)
        say(f"{len(sets.train.rows)} samples, {len(sets.val.rows)} held out, CLIP {clip.name}, {place.device}")
        for name in run.only:
            check_sizes(_model(name, run.config))
        _check_cascade(run)
        about_set = read_json(run.shards / "dataset.json")
        plans = {name: _plan(name, run, sets, about_set, deadline) for name in run.only}
        done = {name for name, plan in plans.items() if is_done(plan)}  # raises where a state is of another run
        for name in NAMES:
            if saved.is_saved(run.out, name) and (name in done or name not in run.only):
                saved.load_model(run.out, name)  # one of another version is told now, not when all are trained
        set_digest = digest(about_set)
        _check_same_set(run, set_digest)
        _check_ahead({name: plan for name, plan in plans.items() if name not in done}, run.config, sets, place)
        if place.leads:
            write_toml(run.out / RESOLVED, _resolved(run))
            write_run(run.out, clip_name, clip.identity, run.shards, set_digest)
        return _fit_all(run, plans, done, sets, place, say)


def _check_ahead(plans: Mapping[Name, Plan], config: RunConfig, sets: Sets, place: Place) -> None:
    """Raise now what would end the training of one model after that of another."""
    for name, plan in plans.items():
        if name != "prior" or config.prior.kind != "linear":
            check_batch(name, plan.training, place)
    if plans.keys() - {"prior"}:
        for split in (sets.train, sets.val):
            check_tars(split.packed)


def _plan(name: Name, run: FitRun, sets: Sets, about_set: Mapping[str, Any], deadline: float | None) -> Plan:
    """How one model is trained, and the digest of all that its state depends on."""
    section = getattr(run.config, name)
    about = {
        "config": section.model_dump(mode="json"),
        "data": run.config.data.model_dump(mode="json"),
        "seed": run.seed,
        "set": about_set,
        "clip": _nameless(sets.clip.identity),
    }
    training = section.training.on(len(sets.train.rows))
    return Plan(run.out / name, training, run.seed, digest(about), run.resume, deadline)


def _resolved(run: FitRun) -> dict[str, Any]:
    """The config; with `only`, the other models' sections stay as the run's folder has them."""
    values: dict[str, Any] = run.config.model_dump(mode="json")
    path = run.out / RESOLVED
    there = read_toml(path) if path.is_file() else {}
    return values | {name: there[name] for name in NAMES if name not in run.only and name in there}


def _fit_all(run: FitRun, plans: dict[Name, Plan], done: set[Name], sets: Sets, place: Place, say: Say) -> bool:
    """Train one model after the other; what is done already is passed over, and its data not read."""
    trained = False
    for name, plan in plans.items():
        if name in done:
            say(f"{name}: all {plan.training.steps} steps are done")
            continue
        if trained and any_process(place, is_late(plan.deadline)):
            return False
        if not _fit_one(_model(name, run.config), plan, sets, place, say):
            return False
        trained = True
    return True


def _model(name: Name, config: RunConfig) -> Config:
    """A section without how it is trained."""
    return saved.KINDS[name].model_validate(getattr(config, name).model_dump(exclude={"training"}))


def _fit_one(model: Config, plan: Plan, sets: Sets, place: Place, say: Say) -> bool:
    """Train one model to its end (True) or the deadline."""
    began = time.monotonic()
    task: PriorTask | DecoderTask | UpsamplerTask
    if isinstance(model, PriorConfig):
        task = PriorTask(model, sets, plan.folder, plan.seed)
        if model.kind == "linear":
            return _keep_closed_form(task, place, say)
    elif isinstance(model, UpsamplerConfig):
        task = UpsamplerTask(model, sets, plan.folder, plan.seed)
    else:
        assert isinstance(model, DecoderConfig)
        task = DecoderTask(model, sets, plan.folder, plan.seed)
    say(f"{task.name}: data ready in {time.monotonic() - began:.0f} s")
    return Loop(task, plan, place, say).run()


def _keep_closed_form(task: PriorTask, place: Place, say: Say) -> bool:
    """The linear prior is done once it is built."""
    if place.leads:
        figures = task.figures()
        log = Log(task.folder, 0)
        log.write(0, figures)
        log.close()
        task.save(task.model.state_dict(), {"step": 0})
        say("prior: " + " ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return True


def _check(run: FitRun) -> None:
    there = [name for name in run.only if (run.out / name / saved.WEIGHTS).is_file()]
    if there and not run.resume:
        stopped = (run.out / there[0] / STATE).is_file()
        hint = "add --resume to continue it, or give another --out" if stopped else "give another --out"
        raise HeadraceError(f"{run.out} already holds a {there[0]}", hint=hint, code=REFUSED)
    if run.resume and not (run.out / RESOLVED).is_file():
        raise HeadraceError(f"there is nothing to resume in {run.out}", hint="leave out --resume", code=REFUSED)


def _check_same_clip(out: Path, clip: Clip) -> None:
    """The three models of a run speak of one CLIP's vectors."""
    if (out / saved.RUN).is_file() and _nameless(saved.read_run(out)["identity"]) != _nameless(clip.identity):
        hint = "give that CLIP and its set, or another --out"
        raise HeadraceError(f"{out} holds models of another CLIP", hint=hint, code=REFUSED)


def _check_same_set(run: FitRun, set_digest: str) -> None:
    """They learned from one set, so that samples are compared with the pictures that were learned from."""
    begun = any((run.out / name / file).is_file() for name in NAMES for file in (saved.WEIGHTS, STATE))
    if begun and (run.out / saved.RUN).is_file() and saved.read_run(run.out).get("set", set_digest) != set_digest:
        raise HeadraceError(f"{run.out} holds models of another set", hint="give another --out", code=REFUSED)


def _check_cascade(run: FitRun) -> None:
    """What the decoder draws must be what the upsampler takes, be they trained now or before."""
    if run.only == ("prior",):
        return
    decoder, upsampler = _known("decoder", run), _known("upsampler", run)
    if not isinstance(decoder, DecoderConfig) or not isinstance(upsampler, UpsamplerConfig):
        return
    if why := misfit(decoder, upsampler):
        hint = "change what is trained now of decoder.side, upsampler.side and upsampler.factor"
        raise HeadraceError(why, hint=hint)


def _known(name: Name, run: FitRun) -> Config | None:
    """The config of a model that is trained now, or was before; of one that is not there, None."""
    if name in run.only:
        return _model(name, run.config)
    return saved.read_config(run.out, name) if saved.is_saved(run.out, name) else None


def _nameless(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A CLIP's identity wherever it lies."""
    return {**identity, "name": ""}


def _clip(run: FitRun, device: torch.device) -> tuple[str, Clip]:
    """The CLIP asked for, or the one whose name the set brings; and the name that it is loaded by."""
    from pipeline.clip import load

    named = run.clip
    if named is None and (run.shards / "dataset.json").is_file():
        named = (read_json(run.shards / "dataset.json").get("clip") or {}).get("name")
    try:
        return named or "mini", load(named or "mini", str(device))
    except HeadraceError as error:
        if run.clip is not None:
            raise
        hint = "give with --clip the CLIP that the set was scored with"
        raise HeadraceError(f"the set's own CLIP cannot be loaded: {error.message}", hint, error.code) from None


def _silent(line: str) -> None:
    del line
