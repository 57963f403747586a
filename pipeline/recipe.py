"""What a recipe holds: one TOML file that names every setting of every stage.

Unknown keys fail with the nearest name. The resolved recipe of a folder is its `recipe.toml`; a command's options
override single keys of it. This module knows no stage's work, only their settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base import MISSING, Config, HeadraceError, parse_config, read_toml, write_toml
from pipeline.dedup import DedupConfig
from pipeline.download import DownloadConfig
from pipeline.filter import FilterConfig
from pipeline.ingest import IngestConfig
from pipeline.miniweb.web import MiniwebConfig
from pipeline.pack import PackConfig
from pipeline.report import ReportConfig
from pipeline.score import ScoreConfig
from pipeline.shards import DataDir

SHIPPED = Path(__file__).parent / "recipes"


class Recipe(Config):
    """Every setting of every stage. The source is `miniweb` or `ingest.source` where given, else `download.urls`."""

    miniweb: MiniwebConfig | None = None
    download: DownloadConfig = DownloadConfig()
    ingest: IngestConfig = IngestConfig()
    score: ScoreConfig = ScoreConfig()
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    pack: PackConfig = PackConfig()
    report: ReportConfig = ReportConfig()

    def override(self, stage: str, values: Mapping[str, Any]) -> Recipe:
        """This recipe with some keys of a stage replaced; a nested key is written with a dot (`fetch.retries`)."""
        nested = self.model_dump()
        for name, value in values.items():
            *path, last = [stage, *name.split(".")]
            place = nested
            for part in path:
                place = place[part]
            place[last] = value
        return parse_config(Recipe, nested, "the command line")

    def published(self) -> dict[str, Any]:
        """The recipe as it goes into a packed set: without where a test server happened to listen."""
        values = self.model_dump(exclude={"download": {"fetch": {"connect"}}})
        return {stage: settings for stage, settings in values.items() if settings is not None}


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or any .toml by its path."""
    shipped = SHIPPED / f"{name}.toml"
    path = shipped if shipped.exists() else Path(name)
    if path.suffix != ".toml" or not path.exists():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        given = "; a list of URLs is given to one by --urls, pictures by --source" if path.exists() else ""
        hint = f"shipped are {names}; else name a .toml{given}"
        raise HeadraceError(f"there is no recipe {name!r}", hint=hint, code=MISSING)
    return parse_config(Recipe, read_toml(path), str(path.name if path == shipped else path))


def folder_recipe(data: DataDir) -> Recipe:
    """The recipe that a folder was last worked with; the defaults for a fresh one."""
    if not data.recipe.exists():
        return Recipe()
    return parse_config(Recipe, read_toml(data.recipe), str(data.recipe))


def save_recipe(recipe: Recipe, data: DataDir) -> None:
    """Leave the resolved recipe in the folder."""
    write_toml(data.recipe, recipe.model_dump())
