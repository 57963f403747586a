"""Settings, their errors, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from pipeline import base
from pipeline.base import (
    Config,
    HeadraceError,
    atomic_path,
    digest,
    parse_config,
    read_json,
    read_toml,
    run_command,
    visible,
    write_bytes,
    write_toml,
)


class Inner(Config):
    min_clip: float = 0.2


class Outer(Config):
    filter: Inner = Inner()
    shard_size: int = Field(10, ge=1)


def test_unknown_key_is_named_with_its_nearest_and_every_problem_at_once() -> None:
    with pytest.raises(HeadraceError) as caught:
        parse_config(Outer, {"shard_sise": 3, "filter": {"min_clap": 1}, "shard_size": 0}, "my.toml")
    message = caught.value.message
    assert "`shard_sise`, did you mean `shard_size`?" in message
    assert "`filter.min_clap`, did you mean `min_clip`?" in message
    assert "`shard_size`: input should be greater than or equal to 1, not 0" in message
    assert caught.value.code == 2


def test_toml_round_trip(tmp_path: Path) -> None:
    values = {"a": 1, "t": {"list": ["x\n", 'q"'], "deep": {"*.test": "127.0.0.1:1", "f": 0.5, "no": False}}}
    write_toml(tmp_path / "r.toml", values | {"none": None})
    assert read_toml(tmp_path / "r.toml") == values


def test_bad_toml_and_json_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("= =")
    with pytest.raises(HeadraceError, match="is not valid TOML"):
        read_toml(tmp_path / "bad")
    with pytest.raises(HeadraceError, match="is damaged"):
        read_json(tmp_path / "bad")
    with pytest.raises(HeadraceError, match="no file") as caught:
        read_toml(tmp_path / "none")
    assert caught.value.code == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="no space left on device") as caught, atomic_path(tmp_path / "f"):
        raise OSError(errno.ENOSPC, "full")
    assert "what was finished is kept" in str(caught.value.hint)


def test_file_and_directory_are_synced_before_and_after_the_rename(tmp_path: Path, monkeypatch: object) -> None:
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    patch.setattr(Path, "rename", lambda self, to: (calls.append("rename"), real_rename(self, to))[1])
    with patch.context():
        base.write_bytes(tmp_path / "f", b"x")
    patch.undo()
    assert calls[1] == "rename" and calls[2] == str(tmp_path) and calls[0].endswith(".tmp")


def test_digest_ignores_key_order_only() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_errors_cross_process_borders_whole() -> None:
    error = pickle.loads(pickle.dumps(HeadraceError("m", "h", 4)))  # noqa: S301
    assert (error.message, error.hint, error.code) == ("m", "h", 4)


def test_visible_is_bounded() -> None:
    assert visible("x" * 1_000_000, 10) == "x" * 9 + "…"
    assert visible("👩\u200d🚀", 10) == "👩\u200d🚀"


def test_what_cannot_be_written_names_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(HeadraceError, match=r"cannot write \S+/f: file exists"):
        write_bytes(tmp_path / "f" / "a.csv", b"")
    assert (tmp_path / "f").read_text() == ""


@pytest.mark.parametrize("name", ["there", b"there"])  # tensorflow's files and ours name themselves differently
def test_a_command_tells_a_disk_that_is_full(name: str | bytes, capsys: pytest.CaptureFixture[str]) -> None:
    def command(_arguments: list[str], standalone_mode: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(base, "hush_libraries", lambda: None)
        run_command(command, "curate", "go on")
    assert caught.value.code == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: cannot write there: no space left on device" and hint.startswith("hint: free some space")


def test_a_full_disk_in_a_librarys_thread_is_told_once() -> None:
    code = (
        "import threading; from pipeline.base import hush_libraries; hush_libraries()\n"
        "def fails(kind): raise kind('of a thread')\n"
        "for kind in (OSError, ValueError):\n    t = threading.Thread(target=fails, args=(kind,)); t.start(); t.join()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError" not in done.stderr and "ValueError: of a thread" in done.stderr
