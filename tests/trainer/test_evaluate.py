"""`trainer eval` on a tiny untrained run: what it writes, what it warns of, and what a user may get wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import MINI, Clip, load
from tests.trainer import tiny
from tests.trainer.packed import pictures_and_captions, write_packed, write_scenes
from trainer import evaluate as module
from trainer.cli import main
from trainer.evaluate import EvalRun, evaluate, judged
from trainer.sets import Sets, Split

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def mini() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, mini: Clip) -> Path:
    captions = pictures_and_captions()[1]
    captions[0] = "<script>alert(1)</script> red \u202e left"
    captions[1] = "red " * 60
    swaps = [[text.replace("left", "top", 1), text.replace(" red", " green")] for text in captions]
    return write_packed(tmp_path_factory.mktemp("set"), captions, swaps, clip=mini)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mini: Clip) -> Path:
    return tiny.write_whole_run(tmp_path_factory.mktemp("runs") / "tiny", mini)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["trainer", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run_main


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_command(run: Path, shards: Path, call: Call) -> None:
    code, out, err = call("eval", "--run", run, "--shards", shards, "--steps", 2, "--count", 12)
    assert code == 0
    assert "R-precision" in out and out.strip().endswith(str(run / "eval" / "index.html"))
    assert "note: the judge, CLIP mini, is the one that conditioned the run" in err and "drawn 12 of 12" in err
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["judge"]["conditioned"] and metrics["captions_too_long"] == 1
    assert len(metrics["samples"]) == metrics["pictures"] == 12
    told = {"sampled", "two_samples", "one_step", "linear", "mean", "unrelated"}
    assert set(metrics["prior"]["cosine"]) == told
    # 16 pictures of training are those of val: the closed form fits, each true picture is its own neighbour
    assert metrics["prior"]["cosine"]["linear"] > metrics["prior"]["cosine"]["mean"] > 0
    assert metrics["neighbours"]["true"]["max"] == pytest.approx(1, abs=1e-2)
    assert metrics["neighbours"]["drawn"]["mean"] < metrics["neighbours"]["true"]["mean"]
    assert metrics["prior"]["cosine"]["mean"] > metrics["prior"]["cosine"]["unrelated"]
    ranks = [sample["rank"] for sample in metrics["samples"]]
    assert metrics["r_precision"]["drawn"] == ranks.count(0) / 12 and metrics["r_precision"]["among"] >= 16
    assert set(metrics["swaps_told_apart"]["drawn"]) == {"all", "attribute", "relation"}
    assert set(metrics["clip_space_distance"]) == {"frechet", "kernel_distance", "cmmd"}
    assert "fid" not in (run / "eval" / "metrics.json").read_text().lower().replace("confid", "")

    page = (run / "eval" / "index.html").read_text()
    tags = Tags()
    tags.feed(page)
    names = [name for name, _ in tags.found]
    assert "script" not in names and "link" not in names and "default-src 'none'" in page
    sources = [attributes["src"] or "" for name, attributes in tags.found if name == "img"]
    assert len(sources) == 3 * (12 + 12) and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "upper bounds" in page and "\u202e" not in page
    assert any("script" in sample["caption"] for sample in metrics["samples"])
    assert "&lt;script&gt;" in page and "\\u202e" in page


def test_a_second_clip_judges(run: Path, shards: Path, tmp_path: Path) -> None:
    other = shutil.copytree(MINI, tmp_path / "other")
    _change_weights(other)
    said: list[str] = []
    asked = EvalRun(run, shards, judge=str(other), count=4, how=module.DEFAULT)
    metrics = evaluate(asked, said.append)
    assert metrics["judge"]["name"] == "other" and not metrics["judge"]["conditioned"]
    assert metrics["clip"]["name"] == "mini"
    assert not any("conditioned the run" in line for line in said)
    assert any("is no longer at nowhere/curated; compared with the training part of" in line for line in said)
    assert "upper bounds" not in (run / "eval" / "index.html").read_text()


def _change_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["text_projection"] = weights["text_projection"].flip(1).contiguous()
    save_file(weights, path)


def test_a_sample_is_what_trainer_sample_draws(run: Path, shards: Path) -> None:
    from trainer.unclip import load as load_run

    asked = EvalRun(run, shards, count=3, seed=5, how=module.How(steps=2, large_steps=2, prior_steps=2))
    unclip = load_run(run)
    held = module.held_out(asked, unclip.clip)
    drawn = module.drawn_samples(unclip, held.captions, asked, lambda line: None)
    alone = unclip.sample([held.captions[2]], [7], 1, asked.how)[0]
    assert np.array_equal(drawn[2], alone)


def test_true_pictures_in_place_of_drawn_ones_are_as_good_as_true_ones(tmp_path: Path, mini: Clip) -> None:
    shards, rows = write_scenes(tmp_path / "set", mini), np.array([2, 5, 9, 11])
    held = module.HeldOut(Sets(Split(shards, "train", mini), Split(shards, "val", mini), mini), shards, rows, 0)
    true = held.true(mini.preprocess).permute(0, 2, 3, 1).contiguous().numpy()
    figures, details = judged(mini, true, held, seed=0)
    for name in ("clip_score", "r_precision", "swaps_told_apart"):
        assert figures[name]["drawn"] == figures[name]["true"]
    assert figures["clip_space_distance"]["frechet"]["drawn"] == pytest.approx(0, abs=1e-9)
    assert figures["clip_space_distance"]["cmmd"]["drawn"] == pytest.approx(0, abs=1e-9)
    assert len(details.rank) == 4 and figures["clip_score"]["true"] > figures["clip_score"]["unrelated"]


def test_what_a_user_may_get_wrong(run: Path, shards: Path, call: Call, tmp_path: Path) -> None:
    no_val = shutil.copytree(shards, tmp_path / "no_val")
    shutil.rmtree(no_val / "val")
    foreign = shutil.copytree(shards, tmp_path / "foreign")
    about = json.loads((foreign / "dataset.json").read_text())
    about["clip"]["weights_sha256"] = "0" * 64
    (foreign / "dataset.json").write_text(json.dumps(about))
    single = write_packed(tmp_path / "single", rows=1, clip=load("mini", "cpu"))
    empty = tmp_path / "empty"
    empty.mkdir()
    lost = shutil.copytree(shards, tmp_path / "lost")
    (lost / "val" / "00000.tar").unlink()
    no_prior = shutil.copytree(run, tmp_path / "no_prior")
    shutil.rmtree(no_prior / "prior")
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (3, "no samples in val", ("--run", run, "--shards", no_val)),
        (4, "other weights", ("--run", run, "--shards", foreign)),
        (2, "has 1 held-out captions", ("--run", run, "--shards", single)),
        (3, "there is no set", ("--run", run, "--shards", tmp_path / "nowhere")),
        (3, "there is no set nowhere/curated", ("--run", run)),
        (3, "is no packed set", ("--run", run, "--shards", empty)),
        (3, "cannot be read: no such file", ("--run", run, "--shards", lost)),
        (3, "has no trained prior", ("--run", no_prior, "--shards", shards)),
        (3, "there is no CLIP called nobody", ("--run", run, "--shards", shards, "--judge", "nobody")),
        (3, "is no run", ("--run", tmp_path)),
    ]
    for code, message, arguments in cases:
        found, out, err = call("eval", *arguments)
        error, hint = err.strip().splitlines()[-2:]
        assert (found, out) == (code, ""), err
        assert re.search(message, error) and error.startswith("error: ") and hint.startswith("hint: "), err
