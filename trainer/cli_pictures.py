"""What a user types after `trainer` to draw pictures: it parses, calls and writes them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
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
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same picture, whatever else is drawn.", min=0)]
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
    unclip.check_lengths(texts)
    jobs = [(text, own) for text in texts for own in seeds]
    how = how_of(steps, guidance)
    rows = {text: [f"{number:02d}-{file_name(text)}-{own}" for own in seeds] for number, text in enumerate(texts)}

    def drawn(part: slice) -> Picture:
        return unclip.sample([text for text, _ in jobs[part]], [own for _, own in jobs[part]], best_of, how)

    _draw(run, "sample", out, rows, [f"seed {own}" for own in seeds], drawn, best_of)


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
    seeds, how = range(seed, seed + count), how_of(steps, guidance)
    rows = {picture.name: [f"vary-{own}" for own in seeds]}
    _draw(
        run, "vary", out, rows, [f"seed {own}" for own in seeds], lambda part: unclip.vary(given, seeds[part], eta, how)
    )


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
    how = how_of(steps, None)
    rows = {f"{a.name} to {b.name}": [f"blend-{number:02d}-{weight:.3f}" for number, weight in enumerate(weights)]}
    columns = [f"{weight:.2f}" for weight in weights]
    _draw(run, "blend", out, rows, columns, lambda part: unclip.blend(*ends, weights[part], seed, how))


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
    how = how_of(steps, None)
    rows = {f"{before} to {after}": [f"edit-{number:02d}-{angle:.3f}" for number, angle in enumerate(angles)]}
    columns = [f"{angle:.2f}" for angle in angles]
    _draw(run, "edit", out, rows, columns, lambda part: unclip.edit(given, before, after, angles[part], seed, how))


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
    seeds, how = range(seed, seed + count), how_of(steps, guidance)
    rows = {text: [f"inpaint-{own}" for own in seeds]}

    def drawn(part: slice) -> Picture:
        return unclip.inpaint(given, paint, text, seeds[part], best_of, how)

    _draw(run, "inpaint", out, rows, [f"seed {own}" for own in seeds], drawn, best_of)


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
    typer.echo(f"writing into {folder}", err=True)
    return folder


def _draw(
    run: Path,
    command: str,
    out: Path | None,
    rows: Mapping[str, Sequence[str]],
    columns: Sequence[str],
    drawn: Callable[[slice], Picture],
    tries: int = 1,
) -> None:
    """Draw pictures, `rows` of file names by label, and a grid of them; each is written when its part is drawn.

    Without `out` they go into a new folder of the run, made for the first. A picture costs `tries`.
    """
    from trainer.pictures import write_png, write_sheet
    from trainer.unclip import BATCH

    todo = [(label, name) for label, names in rows.items() for name in names]
    done: dict[str, list[Picture]] = {label: [] for label in rows}
    size = max(1, BATCH // tries)
    for start in range(0, len(todo), size):
        part = slice(start, start + size)
        for (label, name), picture in zip(todo[part], drawn(part), strict=True):
            out = out or _fresh(run, command)
            write_png(out / f"{name}.png", picture, {"text": label})
            done[label].append(picture)
    assert out is not None
    typer.echo(str(write_sheet(out, done, columns)))
