"""All stages in order: what `curate run` does.

It knows the order and the mini-web around it, and nothing of what a stage does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pipeline import dedup, download, filter, ingest, pack, report, score
from pipeline.base import HeadraceError
from pipeline.books import Summary
from pipeline.intake import lists, sources
from pipeline.recipe import Recipe
from pipeline.shards import DataDir

Say = Callable[[Summary], None]


def run(recipe: Recipe, data: DataDir, workers: int, say: Say) -> None:
    """Bring every stage of a folder up to date by one recipe; `say` is told each stage's books as it ends."""
    _check_one_source(recipe)
    score.settings_of(recipe.score)  # a CLIP that cannot be had is said before hours of fetching
    if recipe.ingest.source is not None:
        say(ingest.run(recipe.ingest, data, workers))
    else:
        with _source(recipe, data) as ready:
            say(download.run(ready.download, data, workers))
    say(score.run(recipe.score, data, workers))
    decide(recipe, data, say)
    say(pack.run(recipe.pack, data, workers, recipe.published()))
    _judge_miniweb(recipe, data)
    say(report.run(recipe.report, data))


def replace(recipe: Recipe, data: DataDir) -> None:
    """`--redo`: forget what the folder holds, but not before the recipe's own source is known to open."""
    _check_one_source(recipe)
    if recipe.ingest.source is not None:
        sources.open_source(recipe.ingest.source, recipe.ingest.captions)
    elif recipe.download.urls is not None:
        lists.open_list(recipe.download.urls, recipe.download.url_col, recipe.download.caption_col)
    download.forget(data)


def _check_one_source(recipe: Recipe) -> None:
    """Raise a `HeadraceError` unless the recipe says where the pictures come from, once."""
    given = {"miniweb": recipe.miniweb, "ingest.source": recipe.ingest.source, "download.urls": recipe.download.urls}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if not names:
        message = "no list of URLs is named, and no folder of pictures"
        raise HeadraceError(message, hint="add --urls FILE, or --source DIR for pictures that you have already")
    if len(names) > 1:
        message = f"the recipe names more than one source of pictures: {' and '.join(names)}"
        raise HeadraceError(message, hint="leave all but one of them out")


def decide(recipe: Recipe, data: DataDir, say: Say) -> None:
    """The stages that only read numbers and write verdicts."""
    say(filter.run(recipe.filter, data))
    say(dedup.run(recipe.dedup, data))


@contextlib.contextmanager
def _source(recipe: Recipe, data: DataDir) -> Iterator[Recipe]:
    """The recipe with a list that can be fetched: for the mini-web it is written, and its server runs meanwhile."""
    if recipe.miniweb is None:
        yield recipe
        return
    from pipeline.miniweb import web

    folder = data.root / "miniweb"
    ready = recipe.override("download", {"urls": str(web.write_list(recipe.miniweb, folder))})
    if download.finished(ready.download, data):
        yield ready
        return
    with web.serve(recipe.miniweb) as server:
        yield ready.override("download", {"fetch.connect": server.connect})


def _judge_miniweb(recipe: Recipe, data: DataDir) -> None:
    """Write what became of every planted fault to `miniweb/fates.parquet`."""
    if recipe.miniweb is not None:
        from pipeline.miniweb import web

        web.write_fates(data)
