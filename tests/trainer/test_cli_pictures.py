"""`trainer sample`, `vary`, `blend`, `edit` and `inpaint` as a user calls them, on a tiny untrained run."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import load
from tests.trainer import tiny
from trainer.cli import main
from trainer.pictures import grid, read_picture, write_png

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_whole_run(tmp_path_factory.mktemp("runs") / "tiny", load("mini", "cpu"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["trainer", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run_main


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), {})
    write_png(tmp_path / "b.png", np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8), {})
    return tmp_path / "a.png"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sample(run: Path, call: Call, tmp_path: Path) -> None:
    options = ("--run", run, "--steps", 3, "--best-of", 1)
    texts = ("a red circle", "ein größeres Quadrat")
    code, out, err = call("sample", *texts, *options, "--count", 2, "--seed", 7, "--out", tmp_path / "out")
    said = (code, out.strip(), err.strip())
    assert said == (0, str(tmp_path / "out" / "grid.png"), "drawn 4 of 4, 0 s left")
    made = ["00-a-red-circle-7", "00-a-red-circle-8", "01-ein-größeres-quadrat-7", "01-ein-größeres-quadrat-8"]
    assert names(tmp_path / "out") == [*(f"{name}.png" for name in made), "grid.png"]
    drawn = [read_picture(tmp_path / "out" / f"{name}.png") for name in made]
    assert np.array_equal(
        read_picture(tmp_path / "out/grid.png"), grid([drawn[:2], drawn[2:]], texts, ["seed 7", "seed 8"])
    )
    call("sample", texts[1], *options, "--count", 1, "--seed", 8, "--out", tmp_path / "one")
    alone = read_picture(tmp_path / "one" / "00-ein-größeres-quadrat-8.png")
    assert np.array_equal(alone, drawn[3])


def test_what_is_drawn_before_ctrl_c_stays(run: Path, tmp_path: Path) -> None:
    options = ("--run", run, "--best-of", 32, "--steps", 30, "--count", 50, "--out", tmp_path / "out")
    command = [Path(sys.executable).with_name("trainer"), "sample", "a red circle", *options]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job would not hear Ctrl-C
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heard}
    with subprocess.Popen([*map(str, command)], **piped) as process:  # type: ignore[call-overload]
        assert process.stderr
        while not process.stderr.readline().startswith("drawn 64 of 1600") and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("interrupted: the pictures that were written stay")
    drawn = names(tmp_path / "out")
    assert "00-a-red-circle-0.png" in drawn and "grid.png" not in drawn and len(drawn) < 50
    assert all(read_picture(tmp_path / "out" / name).shape == (16, 16, 3) for name in drawn)


def test_the_rest(run: Path, call: Call, picture: Path, tmp_path: Path) -> None:
    options = ("--run", run, "--steps", 3, "--count", 2, "--out", tmp_path / "out")
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[:8] = 255
    write_png(tmp_path / "mask.png", mask, {})
    other = tmp_path / "b.png"
    for arguments in (
        ("vary", picture),
        ("vary", picture, "--eta", 0.5, "--seed", 4),
        ("blend", picture, other),
        ("edit", picture, "--from", "a red circle", "--to", "a blue circle"),
        ("inpaint", picture, tmp_path / "mask.png", "a red circle", "--best-of", 2),
    ):
        code, out, err = call(*arguments, *options)
        assert (code, out.strip()) == (0, str(tmp_path / "out" / "grid.png")), arguments
        total = 4 if "--best-of" in arguments else 2
        assert err.splitlines()[-1] == f"drawn {total} of {total}, 0 s left", arguments
        assert all(re.fullmatch(r"drawn \d of \d, \d+ s left", line) for line in err.splitlines()), arguments
    stems = [
        "vary-0",
        "vary-1",
        "vary-4",
        "vary-5",
        "blend-00-0.000",
        "blend-01-1.000",
        "edit-00-0.000",
        "edit-01-0.500",
    ]
    assert names(tmp_path / "out") == sorted(f"{stem}.png" for stem in [*stems, "grid", "inpaint-0", "inpaint-1"])
    painted = read_picture(tmp_path / "out" / "inpaint-1.png")
    assert np.array_equal(painted[8:], read_picture(picture)[8:]) and not np.array_equal(painted, read_picture(picture))


def test_a_single_picture_of_a_way_is_its_middle_or_as_far_as_asked(
    run: Path, call: Call, picture: Path, tmp_path: Path
) -> None:
    options = ("--run", run, "--steps", 1, "--count", 1, "--out", tmp_path / "out")
    assert call("blend", picture, tmp_path / "b.png", *options)[0] == 0
    assert call("edit", picture, "--from", "a red circle", "--to", "a blue circle", "--furthest", 0.3, *options)[0] == 0
    assert names(tmp_path / "out") == ["blend-00-0.500.png", "edit-00-0.300.png", "grid.png"]


def test_pictures_go_into_the_newest_run(
    run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call("sample", "a red circle")
    assert code == 3 and err.startswith("error: there is no run in runs\nhint: ")
    shutil.copytree(run, "runs/old")
    shutil.copytree(run, "runs/new")
    (tmp_path / "runs/new/run.json").touch()
    code, out, _ = call("sample", "a red circle", "--steps", 1, "--best-of", 1, "--count", 1)
    assert (code, out.strip()) == (0, "runs/new/pictures/0001-sample/grid.png")
    code, out, _ = call("sample", "a blue circle", "--steps", 1, "--best-of", 1, "--count", 1)
    assert (code, out.strip()) == (0, "runs/new/pictures/0002-sample/grid.png")


def test_what_a_user_may_get_wrong(run: Path, call: Call, picture: Path, tmp_path: Path) -> None:
    options = ("--run", run, "--out", tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("a red circle")
    write_png(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8), {})
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (3, "nowhere is no run of `trainer fit`", ("sample", "x", "--run", tmp_path / "nowhere")),
        (2, "the CLIP reads 48", ("sample", "red " * 60, *options)),
        (2, "a.png is no mask", ("inpaint", picture, picture, "a red circle", *options)),
        (
            2,
            "the mask .*small.png is 8×8, the picture 16×16",
            ("inpaint", picture, tmp_path / "small.png", "x", *options),
        ),
        (3, "there is no picture .*none.png", ("vary", tmp_path / "none.png", *options)),
        (2, "text.txt is no picture", ("blend", picture, text, *options)),
        (2, "are the same", ("edit", picture, "--from", "a cat", "--to", "a cat", *options)),
        (3, "there is no CLIP called nothing", ("sample", "x", "--clip", "nothing", *options)),
        (2, "cannot write into .*text.txt/in", ("sample", "x", "--run", run, "--out", text / "in")),
        (3, "run.json is no run of", ("sample", "x", "--run", run / "run.json")),
        (2, "--guidance has no use beside --eta", ("vary", picture, "--eta", 0.5, "--guidance", 2, *options)),
    ]
    for code, message, arguments in cases:
        found, out, err = call(*arguments)
        assert found == code and out == "", arguments
        error, hint = err.splitlines()
        assert hint.startswith("hint: ")
        assert re.search(message, error), (message, error)
    assert not (tmp_path / "out").exists()


def test_a_run_that_lacks_a_part(run: Path, call: Call, tmp_path: Path, picture: Path) -> None:
    bare = shutil.copytree(run, tmp_path / "bare")
    options = ("--run", bare, "--steps", 2, "--count", 1)
    shutil.rmtree(bare / "upsampler")
    assert call("sample", "a red circle", *options)[0] == 0
    assert read_picture(bare / "pictures/0001-sample/00-a-red-circle-0.png").shape == (8, 8, 3)
    shutil.rmtree(bare / "prior")
    code, _, err = call("sample", "a red circle", *options)
    assert code == 3 and "no prior" in err
    assert call("vary", picture, *options)[0] == 0
    shutil.rmtree(bare / "decoder")
    code, _, err = call("vary", picture, *options)
    assert code == 3 and "has no trained decoder" in err and "--only decoder" in err


def test_another_clip_is_refused(run: Path, call: Call, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    said = json.loads((other / "run.json").read_text())
    said["identity"]["name"] = "moved"
    (other / "run.json").write_text(json.dumps(said))
    assert call("sample", "a red circle", "--run", other, "--steps", 1, "--best-of", 1)[0] == 0
    said["identity"]["weights_sha256"] = "0" * 64
    (other / "run.json").write_text(json.dumps(said))
    code, _, err = call("sample", "a red circle", "--run", other)
    assert code == 4 and "not trained with the CLIP mini" in err and "--clip" in err


def test_an_upsampler_for_another_decoder_is_refused(run: Path, call: Call, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    said = json.loads((other / "upsampler/config.json").read_text())
    said["config"]["factor"] *= 2
    (other / "upsampler/config.json").write_text(json.dumps(said))
    code, _, err = call("sample", "a red circle", "--run", other)
    assert code == 4 and "do not go together: decoder.side is" in err and "its factor" in err


@pytest.mark.parametrize("command", ["sample", "vary", "blend", "edit", "inpaint"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        "from trainer.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'open_clip', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--run" in done.stdout and "--seed" in done.stdout
