"""What a user meets: help on everything, sentences for errors, exit codes; by the installed command itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from pipeline.cli import app
from pipeline.download import DownloadConfig
from pipeline.filter import FilterConfig
from pipeline.options import given, parameters
from pipeline.recipe import SHIPPED, Recipe, load_recipe
from pipeline.score import ScoreConfig
from tests.pipeline.factory import Row, make_raw, picture

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def curate(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("curate")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.help
    assert all(parameter.help for parameter in command.params if parameter.name != "help"), name
    assert f"`curate {name}" in (ROOT / "README.md").read_text()


def test_the_design_s_commands_are_there() -> None:
    wanted = "run download ingest score filter dedup pack report status verify query"
    assert set(wanted.split()) <= set(COMMANDS)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_stands_in_the_readme(path: Path) -> None:
    assert isinstance(load_recipe(path.stem), Recipe)
    assert f"`{path.stem}`" in (ROOT / "README.md").read_text()


def test_every_setting_is_an_option_of_the_same_name() -> None:
    flags = {parameter.name for parameter in parameters(FilterConfig)}
    assert flags == set(FilterConfig.model_fields)
    assert {"retries", "robots", "image_size", "connect"} <= {p.name for p in parameters(DownloadConfig)}


def test_a_run_leaves_out_what_is_near_a_held_out_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("pictures/0.png", "pictures/1.png", "pictures/2.png", "held/3.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)).save(path)
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    shutil.copy(tmp_path / "pictures/1.png", tmp_path / "held/copy.png")
    (tmp_path / "r.toml").write_text('[score]\nsignals = ["phash"]\n')
    asked = ("--source", "pictures", "--against", "held", "--json")
    result = curate("run", "r.toml", *asked, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "dedup:against" in result.stdout and 'against = "held"' in (tmp_path / "data/recipe.toml").read_text()


def test_given_options_override_and_others_leave_the_recipe() -> None:
    found = given(DownloadConfig, {"retries": 7, "connect": ["*.a.test=127.0.0.1:1"], "threads": None})
    assert found == {"fetch.retries": 7, "fetch.connect": {"*.a.test": "127.0.0.1:1"}}
    assert given(ScoreConfig, {"signals": ["phash,image"]}) == {"signals": ["phash", "image"]}
    recipe = Recipe().override("download", found)
    assert recipe.download.fetch.retries == 7 and recipe.download.threads == Recipe().download.threads


ERRORS = [
    (["run", "no-such-recipe"], 3, "there is no recipe 'no-such-recipe'"),
    (["run", "laion"], 2, "no list of URLs is named"),
    (["download", "missing.parquet"], 3, "missing.parquet"),
    (["score"], 3, "holds no raw shards"),
    (["verify", "nowhere"], 3, "nowhere"),
    (["status"], 3, "holds no run"),
]


@pytest.mark.parametrize(
    ("words", "code", "sentence"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_errors_are_a_sentence_and_a_hint(tmp_path: Path, words: list[str], code: int, sentence: str) -> None:
    result = curate(*words, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    error, hint = result.stderr.strip().splitlines()
    assert error.startswith("error: ") and sentence in error and hint.startswith("hint: ")


def test_a_list_in_the_place_of_a_recipe_is_told_where_it_goes(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url\nhttp://127.0.0.1/a.png\n")
    result = curate("run", "list.csv", cwd=tmp_path)
    assert result.returncode == 3 and "given to one by --urls" in result.stderr


def test_a_list_of_which_nothing_comes_is_not_blamed_on_a_rule(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[score]\nsignals = ["image", "phash"]\n')
    (tmp_path / "list.csv").write_text("url\nhttp://127.0.0.1/a.png\nhttp://127.0.0.1/b.png\n")
    result = curate("run", "own.toml", "--urls", "list.csv", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    error, hint = result.stderr.strip().splitlines()[-2:]
    assert "all 2 rows were dropped, 2 of them by fetch:blocked_address" in error and "check the list" in hint


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[filter]\nmin_clp = 0.3\n")
    result = curate("run", "r.toml", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown key `filter.min_clp`, did you mean `min_clip`?" in result.stderr


def test_a_new_threshold_is_one_command_and_is_remembered(tmp_path: Path) -> None:
    rows = [Row(picture(i, 64 + 16 * i), f"picture number {i}") for i in range(6)]
    make_raw(tmp_path / "data", rows, shard_size=4)
    assert curate("score", "--signals", "image,caption,phash", cwd=tmp_path).returncode == 0
    wrong = curate("filter", "--min-clip", "7", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "`filter.min_clip`: input should be less than or equal to 1, not 7.0" in wrong.stderr
    result = curate("filter", "--min-side", "90", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "min_side" in result.stdout and "kept" in result.stdout
    recipe = (tmp_path / "data/recipe.toml").read_text()
    assert "min_side = 90" in recipe
    assert '"safety"' in recipe  # --signals picked for one call and narrowed nothing
    again = json.loads(curate("filter", "--json", cwd=tmp_path).stdout)
    assert again["done"] == 0 and again["fates"]["filter:min_side"] == 2
