"""The `curate` command: parses, calls, prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import options, recipe
from pipeline.base import FINDINGS, Config, run_command
from pipeline.books import Summary, raw_markers
from pipeline.dedup import DedupConfig
from pipeline.download import DownloadConfig
from pipeline.engine import one_run
from pipeline.filter import FilterConfig
from pipeline.ingest import IngestConfig
from pipeline.pack import PackConfig
from pipeline.recipe import Recipe
from pipeline.report import ReportConfig
from pipeline.score import ScoreConfig
from pipeline.shards import DataDir

app = typer.Typer(
    help="From lists of web image-caption pairs, or a folder of pictures, to curated, trainer-ready shards.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)

Data = Annotated[Path, typer.Option("--data", help="The folder that holds the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes to work with.")]
HERE = Path("data")
CORES = os.cpu_count() or 1


def main() -> None:
    """Run the command."""
    run_command(app, "curate", "run the same command again, finished shards are kept")


@app.command(name="run")
def run_(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a .toml.")],
    urls: Annotated[str | None, typer.Option(help="The list of URLs, where the recipe wants one.")] = None,
    url_col: Annotated[str | None, typer.Option(help="The list's column of URLs, if it has no usual name.")] = None,
    caption_col: Annotated[str | None, typer.Option(help="The list's column of captions, likewise.")] = None,
    source: Annotated[str | None, typer.Option(help="The folder or tars, where the recipe ingests.")] = None,
    captions: Annotated[str | None, typer.Option(help="A table of captions for the folder's pictures.")] = None,
    clip: Annotated[str | None, typer.Option(help="The CLIP that scores: mini, NAME:PRETRAINED or a folder.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Drop what is near this set: pictures, packed or data folder.")
    ] = None,
    connect: Annotated[list[str] | None, typer.Option(help="PATTERN=HOST:PORT of a server of your own.")] = None,
    data: Data = HERE,
    workers: Workers = CORES,
    redo: Annotated[bool, typer.Option("--redo", help="Replace what another list left in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Run all stages in order by a recipe: miniweb, miniweb-train, folder, laion, datacomp, or a .toml of your own."""
    from pipeline import run, summary

    chosen = recipe.load_recipe(name)
    chosen = _overridden(chosen, "download", urls=urls, url_col=url_col, caption_col=caption_col, connect=connect)
    chosen = _overridden(chosen, "ingest", source=source, captions=captions)
    chosen = _overridden(chosen, "score", clip=clip)
    chosen = _overridden(chosen, "dedup", against=against)
    folder = DataDir(data)
    with one_run(folder):
        if redo:
            run.replace(chosen, folder)

        def say(books: Summary) -> None:  # the folder has taken this recipe's list: later commands go on with it
            recipe.save_recipe(chosen, folder)
            _tell(books, as_json)

        run.run(chosen, folder, workers, say)
    if not as_json:
        print(summary.run_text(folder))


def _overridden(chosen: Recipe, stage: str, **values: Any) -> Recipe:
    kind = type(getattr(chosen, stage))
    return chosen.override(stage, options.given(kind, values)) if any(values.values()) else chosen


@app.command()
def status(data: Data = HERE, as_json: Json = False) -> None:
    """Show every stage: shards done, stale and missing, rows and rate."""
    from pipeline import status as stage_status

    stages = stage_status.status(DataDir(data))
    _print(stage_status.as_json(stages), as_json, lambda _: stage_status.text(stages))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A packed set: data/curated, or a copy of it.")],
    as_json: Json = False,
) -> None:
    """Check a packed set: checksums, counts, alignment; name every bad shard. Exit code 1 when something is wrong."""
    from pipeline import verify as checks

    found = checks.run(folder)
    _print([asdict(finding) for finding in found.findings], as_json, lambda _: found.text())
    if found.findings:
        raise typer.Exit(FINDINGS)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over urls, raw, signals, decisions, curated.")],
    out: Annotated[Path | None, typer.Option(help="Write the result to a .parquet, .csv or .jsonl file.")] = None,
    data: Data = HERE,
    as_json: Json = False,
) -> None:
    """Ask the tables of a run by SQL; nothing can be written or read beside them."""
    from pipeline import query as asking

    asking.run(DataDir(data), sql, out, as_json)


# --- the stages' commands: every field of a stage's settings is an option -----------------------------


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _argument(name: str, metavar: str, text: str) -> inspect.Parameter:
    kind = Annotated[str, typer.Argument(metavar=metavar, help=text)]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)


WORKERS = _keyword("workers", Workers, CORES)
REDO = _keyword("redo", Annotated[bool, typer.Option("--redo", help="Replace what the folder holds.")], False)
RETRY_HELP = "Fetch again the rows that failed in a way that can still succeed."
RETRY = _keyword("retry_failed", Annotated[bool, typer.Option("--retry-failed", help=RETRY_HELP)], False)
COMMON = (_keyword("data", Data, HERE), _keyword("as_json", Json, False))

Work = Callable[..., Summary]


def _stage(
    name: str, kind: type[Config], *extra: inspect.Parameter, once: frozenset[str] = frozenset()
) -> Callable[[Work], Work]:
    """Register `work(recipe, folder, …)` as the command of a stage, with `extra` parameters of its own.

    Options go into the folder's recipe, but for those that hold this `once`.
    """
    arguments = [p for p in extra if p.kind is p.POSITIONAL_OR_KEYWORD]
    flags = [p for p in extra if p.kind is p.KEYWORD_ONLY]
    fields = options.parameters(kind, skip=frozenset(p.name for p in arguments))

    def register(work: Work) -> Work:
        def command(**values: Any) -> None:
            folder, as_json = DataDir(values["data"]), values["as_json"]
            if name not in ("download", "ingest") and not folder.markers.is_dir():
                raw_markers(folder)  # says so, before a folder of a mistyped name is made
            with one_run(folder):
                before, given = recipe.folder_recipe(folder), options.given(kind, values)
                chosen = before.override(name, given)
                _tell(work(chosen, folder, **{p.name: values[p.name] for p in flags}), as_json)
                lasting = {key: value for key, value in given.items() if key not in once}
                recipe.save_recipe(before.override(name, lasting), folder)
            if name in ("filter", "dedup") and not as_json:
                print(_funnel(folder))

        command.__doc__ = work.__doc__
        parameters = [*arguments, *fields, *flags, *COMMON]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name=name)(command)
        return work

    return register


@_stage(
    "download",
    DownloadConfig,
    _argument("urls", "URLS", "The list: a path or glob of .parquet, .csv, .tsv, .json(l) or .txt files."),
    WORKERS,
    REDO,
    RETRY,
)
def _download(chosen: Recipe, folder: DataDir, workers: int, redo: bool, retry_failed: bool) -> Summary:
    """Fetch a list of URLs into urls/ and raw/, politely, by img2dataset."""
    from pipeline import download, run

    if redo:
        run.replace(Recipe(download=chosen.download), folder)
    return download.run(chosen.download, folder, workers, retry_failed=retry_failed)


@_stage(
    "ingest", IngestConfig, _argument("source", "SOURCE", "A folder, tars, or an img2dataset output."), WORKERS, REDO
)
def _ingest(chosen: Recipe, folder: DataDir, workers: int, redo: bool) -> Summary:
    """Take in pictures already on disk: a folder, WebDataset tars, an img2dataset output."""
    from pipeline import ingest, run

    if redo:
        run.replace(Recipe(ingest=chosen.ingest), folder)
    return ingest.run(chosen.ingest, folder, workers)


@_stage("score", ScoreConfig, WORKERS, once=frozenset({"signals"}))
def _score(chosen: Recipe, folder: DataDir, workers: int) -> Summary:
    """Decode every stored picture once and write its signals: clip, safety, phash, image, caption."""
    from pipeline import score

    return score.run(chosen.score, folder, workers)


@_stage("filter", FilterConfig)
def _filter(chosen: Recipe, folder: DataDir) -> Summary:
    """Decide by thresholds and rules on the signals, in seconds; the first rule that fails is the reason."""
    from pipeline import filter

    return filter.run(chosen.filter, folder)


@_stage("dedup", DedupConfig)
def _dedup(chosen: Recipe, folder: DataDir) -> Summary:
    """Drop near-duplicates among what the filter keeps: the best of each neighbourhood stays."""
    from pipeline import dedup

    return dedup.run(chosen.dedup, folder)


@_stage("pack", PackConfig, WORKERS)
def _pack(chosen: Recipe, folder: DataDir, workers: int) -> Summary:
    """Write the survivors to curated/: trainer-ready shards with embeddings, checksums and a dataset card."""
    from pipeline import pack

    return pack.run(chosen.pack, folder, workers, chosen.published())


@_stage("report", ReportConfig)
def _report(chosen: Recipe, folder: DataDir) -> Summary:
    """Write report/index.html: the funnel, histograms, kept and dropped pictures by reason, duplicates."""
    from pipeline import report

    return report.run(chosen.report, folder)


# --- printing ----------------------------------------------------------------------------------------


def _tell(summary: Summary, as_json: bool) -> None:
    print(json.dumps(vars(summary)) if as_json else summary.sentence(), flush=True)


def _print(value: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    print(json.dumps(value, ensure_ascii=False) if as_json else text(value))


def _funnel(folder: DataDir) -> str:
    from pipeline import summary

    return summary.funnel_text(folder)
