"""The `trainer` command line: help is quick and complete, errors are two lines and a code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from pipeline.base import read_toml
from trainer.cli import app
from trainer.config import read_run_config
from trainer.saved import NAMES

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from trainer.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("clip", "--help"), ("fit", "--help"), ("eval", "--help"), ("export", "--help")]
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from trainer.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'open_clip', 'numpy', 'pyarrow', 'PIL', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clip" in done.stdout.lower()


def test_a_missing_set_is_an_error_and_a_hint(tmp_path: Path) -> None:
    done = run("clip", "--shards", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert done.returncode == 3 and not (tmp_path / "out").exists()
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and "nowhere" in error and hint.startswith("hint: ")


def test_a_setting_that_is_none_is_named_before_anything_is_written(tmp_path: Path) -> None:
    asked = ("fit", "--shards", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    done = run(*asked, "--set", "decoder.training.stepz=3")
    assert done.returncode == 2 and not (tmp_path / "out").exists() and "stepz" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    done = run(*asked, "--set", "decoder.training.steps=3")  # a setting; what is wrong now is the set
    assert done.returncode == 3 and "nowhere" in done.stderr and "steps" not in done.stderr


def test_usage_errors_have_code_2() -> None:
    assert run("clip").returncode == 2
    assert run("clip", "--bogus").returncode == 2


def test_a_wrong_option_is_an_error_and_a_hint() -> None:
    error, hint = run("sample", "--bogus").stderr.strip().splitlines()
    assert error.startswith("error: ") and "--bogus" in error
    assert hint.startswith("hint: ") and hint.endswith("sample --help` says what it takes")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert all(parameter.help for parameter in command.params if parameter.param_type_name == "option"), name
    assert f"`trainer {name}" in (ROOT / "README.md").read_text()


def test_only_names_a_model(tmp_path: Path) -> None:
    done = run("fit", "--shards", str(tmp_path), "--only", "bogus")
    assert done.returncode == 2 and "--only 'bogus' is no model" in done.stderr


def test_without_a_config_a_cpu_takes_mini_and_a_gpu_base(shards: Path, tmp_path: Path) -> None:
    asked = ("fit", "--shards", str(shards), "--out", str(tmp_path / "out"), "--only", "prior", "--max-minutes", "0")
    assert run(*asked).returncode == 1
    name = "base" if torch.cuda.is_available() else "mini"
    expected = read_run_config(name, ()).model_dump(mode="json")
    said = read_toml(tmp_path / "out" / "config.toml")
    assert {section: said[section]["training"]["steps"] for section in NAMES} == {
        section: expected[section]["training"]["steps"] for section in NAMES
    }
    assert said["decoder"]["channels"] == expected["decoder"]["channels"]


@pytest.mark.parametrize("name", ["mini", "base"])
def test_conditions_are_dropped_at_the_papers_rates(name: str) -> None:
    """Ramesh et al. 2022, 2.1 and 2.2: the decoder's picture vector in 10%, its caption in 50%; the prior's in 10%."""
    config = read_run_config(name, ())
    assert (config.decoder.drop_image, config.decoder.drop_text, config.prior.drop_text) == (0.1, 0.5, 0.1)
