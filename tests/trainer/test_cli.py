"""The `trainer` command line: help is quick and complete, errors are two lines and a code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from trainer.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [("--help",), ("clip", "--help")])
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


def test_usage_errors_have_code_2() -> None:
    assert run("clip").returncode == 2
    assert run("clip", "--bogus").returncode == 2


def test_ctrl_c_has_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.cli.app", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert "--resume" in capsys.readouterr().err
