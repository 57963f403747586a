"""What a user types after `trainer`: it parses, calls and prints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.base import HeadraceError, run_command

if TYPE_CHECKING:
    from trainer.cascade import How
    from trainer.unclip import Picture, UnClip

PARTLY = 1

RunOption = Annotated[Path | None, typer.Option("--run", help="What `trainer fit` left; else the newest in runs/.")]
ClipOption = Annotated[str | None, typer.Option("--clip", help="The run's CLIP, if it is no longer where it was.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where PNG files go; else a new folder in RUN/pictures.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same picture.", min=0)]
CountOption = Annotated[int, typer.Option(help="How many pictures.", min=1, max=100)]
BestOption = Annotated[int, typer.Option(help="Draw so many for each and keep what the CLIP finds best.", min=1)]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps of the decoder.", min=1, max=1000)]
GuidanceOption = Annotated[
    float | None, typer.Option(help="How strictly the decoder follows text and vector; 1 is plain.", min=0)
]
PictureArgument = Annotated[Path, typer.Argument(metavar="IMG", help="A PNG, JPEG or WebP file.")]

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
    run = Run(tuple(shards), out, settings, seed, resume, max_minutes, start_from)
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


@app.command()
def sample(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to draw, each in its own quotes.")],
    run: RunOption = None,
    clip: ClipOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 4,
    best_of: BestOption = 4,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
) -> None:
    """Draw pictures from texts."""
    from trainer.pictures import file_name

    texts, seeds = list(dict.fromkeys(texts)), range(seed, seed + count)
    run, unclip = _open(run, clip, out, len(texts) * count * best_of)
    jobs = [(text, own) for text in texts for own in seeds]
    drawn = unclip.sample([text for text, _ in jobs], [own for _, own in jobs], best_of, _how(steps, guidance))
    names = [f"{texts.index(text):02d}-{file_name(text)}-{own}" for text, own in jobs]
    rows = {
        text: dict(list(zip(names, drawn, strict=True))[start : start + count])
        for start, text in zip(range(0, len(jobs), count), texts, strict=True)
    }
    _write(out or _fresh(run, "sample"), rows, [f"seed {own}" for own in seeds])


@app.command()
def vary(
    picture: PictureArgument,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Start at the picture's own noise: 0 redraws it at the run's size, 1 moves furthest.", min=0, max=1
        ),
    ] = None,
    run: RunOption = None,
    clip: ClipOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 4,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
) -> None:
    """Draw pictures that mean the same as one; without --eta they share nothing else."""
    from trainer.pictures import read_picture

    if eta is not None and guidance is not None:
        hint = "leave one of them out"
        raise HeadraceError("--guidance has no use beside --eta, which draws without guidance", hint=hint)
    given = read_picture(picture)
    run, unclip = _open(run, clip, out, count)
    seeds = range(seed, seed + count)
    drawn = unclip.vary(given, seeds, eta, _how(steps, guidance))
    row = {f"vary-{own}": one for own, one in zip(seeds, drawn, strict=True)}
    _write(out or _fresh(run, "vary"), {picture.name: row}, [f"seed {own}" for own in seeds])


@app.command()
def blend(
    a: PictureArgument,
    b: PictureArgument,
    run: RunOption = None,
    clip: ClipOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 5,
    steps: StepsOption = None,
) -> None:
    """Draw the way from one picture to another."""
    from trainer.pictures import read_picture

    ends = read_picture(a), read_picture(b)
    run, unclip = _open(run, clip, out, count)
    weights = _spread(count, 1, alone=0.5)
    drawn = unclip.blend(*ends, weights, seed, _how(steps, None))
    row = {f"blend-{number:02d}-{weights[number]:.3f}": one for number, one in enumerate(drawn)}
    _write(out or _fresh(run, "blend"), {f"{a.name} to {b.name}": row}, [f"{weight:.2f}" for weight in weights])


@app.command()
def edit(
    picture: PictureArgument,
    before: Annotated[str, typer.Option("--from", help="What the picture shows.")],
    after: Annotated[str, typer.Option("--to", help="What it shall show.")],
    furthest: Annotated[float, typer.Option(help="How far to go, as a share of all the way.", min=0, max=1)] = 0.5,
    run: RunOption = None,
    clip: ClipOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 5,
    steps: StepsOption = None,
) -> None:
    """Move a picture from what one text says towards another, by small steps."""
    from trainer.pictures import read_picture

    given = read_picture(picture)
    run, unclip = _open(run, clip, out, count)
    angles = _spread(count, furthest, alone=furthest)
    drawn = unclip.edit(given, before, after, angles, seed, _how(steps, None))
    row = {f"edit-{number:02d}-{angles[number]:.3f}": one for number, one in enumerate(drawn)}
    _write(out or _fresh(run, "edit"), {f"{before} → {after}": row}, [f"{angle:.2f}" for angle in angles])


@app.command()
def inpaint(
    picture: PictureArgument,
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="As large as IMG: white where to paint, else black.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the whole picture shall show.")],
    run: RunOption = None,
    clip: ClipOption = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 4,
    best_of: BestOption = 4,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
) -> None:
    """Paint a part of a picture anew; all other pixels stay exactly as they are."""
    from trainer.pictures import read_mask, read_picture

    given = read_picture(picture)
    paint = read_mask(mask, given.shape[:2])
    run, unclip = _open(run, clip, out, count * best_of)
    seeds = range(seed, seed + count)
    drawn = unclip.inpaint(given, paint, text, seeds, best_of, _how(steps, guidance))
    row = {f"inpaint-{own}": one for own, one in zip(seeds, drawn, strict=True)}
    _write(out or _fresh(run, "inpaint"), {text: row}, [f"seed {own}" for own in seeds])


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
    asked = EvalRun(run, shards, clip, judge, count, seed, _how(steps, guidance))
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


def _open(run: Path | None, clip: str | None, out: Path | None, count: int) -> tuple[Path, UnClip]:
    """The run, ready to draw `count` pictures, the best of which go into `out`, and to say how far it is.

    A place that cannot be written to is told now, not when all is drawn.
    """
    from trainer.pictures import FOLDER
    from trainer.unclip import load, newest_run

    run = run or newest_run(Path("runs"))
    loaded = load(run, clip)
    folder = out or run / FOLDER
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise HeadraceError(f"cannot write into {folder}: {place} is closed or no folder", hint="give another --out")
    loaded.on_drawn = _counting(count)
    return run, loaded


def _counting(total: int) -> Callable[[int], None]:
    """Says after every batch how many of all pictures are drawn, and how long the rest will take."""
    done, started = 0, time.monotonic()

    def say(count: int) -> None:
        nonlocal done
        done += count
        left = (time.monotonic() - started) * (total - done) / done
        typer.echo(f"drawn {done} of {total}, {left:.0f} s left", err=True)

    return say


def _how(steps: int | None, guidance: float | None) -> How:
    from dataclasses import replace

    from trainer.cascade import DEFAULT

    how = DEFAULT if steps is None else replace(DEFAULT, steps=steps)
    return how if guidance is None else replace(how, image_guidance=guidance, text_guidance=guidance)


def _spread(count: int, last: float, alone: float) -> list[float]:
    """`count` numbers from 0 to `last`, evenly; where there is only one, `alone`."""
    return [last * number / (count - 1) for number in range(count)] if count > 1 else [alone]


def _fresh(run: Path, command: str) -> Path:
    """The next folder in RUN/pictures, so that nothing drawn before is written over."""
    from trainer.pictures import FOLDER

    numbers = (path.name.split("-")[0] for path in (run / FOLDER).glob("*-*"))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    folder = run / FOLDER / f"{last + 1:04d}-{command}"
    folder.mkdir(parents=True)
    return folder


def _write(folder: Path, rows: dict[str, dict[str, Picture]], columns: list[str]) -> None:
    from trainer.pictures import write_sheet

    typer.echo(str(write_sheet(folder, rows, columns)))


def main() -> None:
    """Run the command."""
    run_command(app, "trainer", "`trainer fit` and `trainer clip` go on from the last state with --resume")
