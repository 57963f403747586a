"""What a user types after `trainer` to draw pictures: it parses, calls and writes them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.base import HeadraceError

if TYPE_CHECKING:
    from trainer.cascade import How
    from trainer.unclip import Picture, UnClip

RunOption = Annotated[Path | None, typer.Option("--run", help="What `trainer fit` left; else the newest in runs/.")]
ClipOption = Annotated[str | None, typer.Option("--clip", help="The run's CLIP, if it is no longer where it was.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where PNG files go; else a new folder in RUN/pictures.")]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same picture, to a grey level.", min=0)]
CountOption = Annotated[int, typer.Option(help="How many pictures.", min=1, max=100)]
BestOption = Annotated[int, typer.Option(help="Draw so many for each and keep what the CLIP finds best.", min=1)]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps of the decoder.", min=1, max=1000)]
GuidanceOption = Annotated[
    float | None, typer.Option(help="How strictly the decoder follows text and vector; 1 is plain.", min=0)
]
PictureArgument = Annotated[Path, typer.Argument(metavar="IMG", help="A PNG, JPEG or WebP file.")]


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
    drawn = unclip.sample([text for text, _ in jobs], [own for _, own in jobs], best_of, how_of(steps, guidance))
    names = [f"{texts.index(text):02d}-{file_name(text)}-{own}" for text, own in jobs]
    rows = {
        text: dict(list(zip(names, drawn, strict=True))[start : start + count])
        for start, text in zip(range(0, len(jobs), count), texts, strict=True)
    }
    _write(out or _fresh(run, "sample"), rows, [f"seed {own}" for own in seeds])


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
    drawn = unclip.vary(given, seeds, eta, how_of(steps, guidance))
    row = {f"vary-{own}": one for own, one in zip(seeds, drawn, strict=True)}
    _write(out or _fresh(run, "vary"), {picture.name: row}, [f"seed {own}" for own in seeds])


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
    drawn = unclip.blend(*ends, weights, seed, how_of(steps, None))
    row = {f"blend-{number:02d}-{weights[number]:.3f}": one for number, one in enumerate(drawn)}
    _write(out or _fresh(run, "blend"), {f"{a.name} to {b.name}": row}, [f"{weight:.2f}" for weight in weights])


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
    drawn = unclip.edit(given, before, after, angles, seed, how_of(steps, None))
    row = {f"edit-{number:02d}-{angles[number]:.3f}": one for number, one in enumerate(drawn)}
    _write(out or _fresh(run, "edit"), {f"{before} → {after}": row}, [f"{angle:.2f}" for angle in angles])


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
    drawn = unclip.inpaint(given, paint, text, seeds, best_of, how_of(steps, guidance))
    row = {f"inpaint-{own}": one for own, one in zip(seeds, drawn, strict=True)}
    _write(out or _fresh(run, "inpaint"), {text: row}, [f"seed {own}" for own in seeds])


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


def how_of(steps: int | None, guidance: float | None) -> How:
    """The plain settings with what a user gave in their place."""
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
