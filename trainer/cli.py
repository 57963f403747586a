"""What a user types after `trainer`: it parses, calls and prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.base import HeadraceError, run_command
from trainer.cli_pictures import (
    ClipOption,
    GuidanceOption,
    RunOption,
    SeedOption,
    StepsOption,
    blend,
    edit,
    how_of,
    inpaint,
    sample,
    vary,
)

PARTLY = 1
AGAIN = "nothing was written; ask for it again"
INTERRUPTED = {
    "clip": "`trainer clip` goes on from the last state with --resume",
    "fit": "`trainer fit` goes on from the last state with --resume",
    "eval": AGAIN,
    "export": AGAIN,
}

app = typer.Typer(rich_markup_mode=None, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def trainer() -> None:
    """Train on what `curate pack` wrote."""


@app.command()
def clip(
    shards: Annotated[list[Path], typer.Option(help="A packed set (data/curated); may be given several times.")],
    out: Annotated[Path, typer.Option(help="Where the CLIP and its training state go.")] = Path("runs/clip"),
    config: Annotated[
        Path | None,
        typer.Option(help="JSON of model, preprocessing and training."),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            help="Go on from this CLIP's weights: mini, NAME:PRETRAINED or a directory; --config must fit it."
        ),
    ] = None,
    lexicon: Annotated[
        Path | None,
        typer.Option(help="Table of words and what each is a kind of (word, kinds, weights), for `readout_steps`."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another CLIP.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly where it stood.")] = False,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Stop after so many minutes, ready to resume; of `readout_steps`, all or none count.", min=0),
    ] = None,
) -> None:
    """Train a compact CLIP that `curate score --clip OUT` can use; exit code 1 when the time was up before the end."""
    from trainer.clip_run import Run
    from trainer.config import CLIP_DEFAULT, read_clip_config
    from trainer.fit_clip import fit

    settings = read_clip_config(config or CLIP_DEFAULT)
    run = Run(tuple(shards), out, settings, seed, resume, max_minutes, start_from, lexicon)
    done = fit(run, lambda line: typer.echo(line, err=True))
    _end_of_training(out, done)


@app.command()
def fit(
    shards: Annotated[Path, typer.Option(help="A packed set with CLIP vectors (data/curated).")],
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/first"),
    config: Annotated[
        str | None, typer.Option(help="`mini`, `base` or a TOML file; by default mini on a CPU, base on a GPU.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, over the config; may be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="prior, decoder or upsampler; may be repeated.")] = None,
    clip: Annotated[str | None, typer.Option(help="The CLIP of the set, where it is not found by its name.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another run.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly where it stood.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes, ready to resume.", min=0)
    ] = None,
) -> None:
    """Train prior, decoder and upsampler in turn; with `torchrun --no-python trainer fit …` on several GPUs.

    Exit code 1 when the time was up before the end.
    """
    import torch

    from trainer.config import read_run_config
    from trainer.fit import FitRun, fit
    from trainer.saved import NAMES

    for name in only or ():
        if name not in NAMES:
            raise HeadraceError(f"--only {name!r} is no model", hint=f"give {', '.join(NAMES)}")
    settings = read_run_config(config or ("base" if torch.cuda.is_available() else "mini"), set_ or ())
    names = tuple(name for name in NAMES if not only or name in only)
    run = FitRun(shards, out, settings, seed, clip, names, resume, max_minutes)
    _end_of_training(out, fit(run, lambda line: typer.echo(line, err=True)))


for draws in (sample, vary, blend, edit, inpaint):
    app.command()(draws)


@app.command("eval")
def eval_(
    run: RunOption = None,
    shards: Annotated[
        Path | None, typer.Option(help="A packed set whose `val` is used; else the one that was trained on.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="A second CLIP, that conditioned nothing, to judge by.")] = None,
    clip: ClipOption = None,
    seed: SeedOption = 0,
    count: Annotated[int, typer.Option(help="How many held-out captions, one picture each.", min=2)] = 256,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
) -> None:
    """Judge a run on held-out captions: metrics.json and a page to look at, below RUN/eval."""
    from trainer.evaluate import FOLDER, EvalRun, evaluate
    from trainer.evaluate_page import PAGE, summary
    from trainer.unclip import newest_run

    run = run or newest_run(Path("runs"))
    asked = EvalRun(run, shards, clip, judge, count, seed, how_of(steps, guidance))
    metrics = evaluate(asked, lambda line: typer.echo(line, err=True))
    for line in summary(metrics):
        typer.echo(line)
    typer.echo(str(run / FOLDER / PAGE))


@app.command()
def export(
    run: RunOption = None,
    out: Annotated[
        Path | None, typer.Option(help="The directory; else RUN/diffusers. An earlier export there is replaced.")
    ] = None,
    clip: ClipOption = None,
) -> None:
    """Write a run with all three models as a directory that diffusers loads without Headrace.

    Loading it takes `pip install "headrace[export]"`, or any place with torch, diffusers and transformers; its README
    shows how. The run's CLIP must have open_clip's own text tower.
    """
    from trainer.export import FOLDER, export
    from trainer.unclip import newest_run

    run = run or newest_run(Path("runs"))
    out = out or run / FOLDER
    export(run, out, clip)
    typer.echo(str(out))


def _end_of_training(out: Path, done: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun would end the first process at another's exit code
        return
    typer.echo(str(out) if done else f"{out}: the time was up; continue with --resume")
    if not done:
        raise typer.Exit(PARTLY)


def main() -> None:
    """Run the command."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    run_command(app, "trainer", INTERRUPTED.get(command, "the pictures that were written stay"))
