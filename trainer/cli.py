"""What a user types after `trainer`: it parses, calls and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.base import HeadraceError

INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


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
    seed: Annotated[int, typer.Option(help="Another seed gives another CLIP.", min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly where it stood.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes, ready to resume.", min=0)
    ] = None,
) -> None:
    """Train a compact CLIP that `curate score --clip OUT` can use."""
    from trainer.config import CLIP_DEFAULT, read_clip_config
    from trainer.fit_clip import Run, fit

    settings = read_clip_config(config or CLIP_DEFAULT)
    fit(Run(tuple(shards), out, settings, seed, resume, max_minutes), lambda line: typer.echo(line, err=True))
    typer.echo(str(out))


def main() -> None:
    """Run the command; every error of the user's making ends as `error:` and `hint:` with its exit code."""
    try:
        app()
    except HeadraceError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted: the last checkpoint is kept, continue with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
