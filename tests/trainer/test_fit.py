"""Fitting all three models: it resumes exactly, and bad input is one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.base import HeadraceError, parse_config, write_toml
from pipeline.clip import Clip
from tests.trainer.packed import small_files, write_packed
from tests.trainer.tiny_run import PRIOR, TINY, TRAINING, run, silent
from trainer import checkpoint
from trainer.decoder import DecoderConfig
from trainer.fit import RunConfig, fit
from trainer.loop import STATE
from trainer.prior import PriorConfig
from trainer.saved import NAMES, WEIGHTS, load_model, read_run
from trainer.upsampler import UpsamplerConfig


@pytest.fixture(scope="module")
def fitted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    assert fit(run(shards, out), silent)
    return out


def test_a_run_holds_models_states_figures_and_samples(fitted: Path, clip: Clip) -> None:
    assert read_run(fitted)["identity"] == clip.identity and (fitted / "config.toml").is_file()
    for name, kind in zip(NAMES, (PriorConfig, DecoderConfig, UpsamplerConfig), strict=True):
        model, config = load_model(fitted, name)
        assert isinstance(config, kind) and not model.training
        lines = [json.loads(line) for line in (fitted / name / "metrics.jsonl").read_text().splitlines()]
        names = {key for line in lines for key in line}
        assert {"loss", "samples_per_s", "mfu", "waiting", "held_out/loss_t50", "held_out/raw_loss_t50"} <= names
        assert list((fitted / name / "tensorboard").iterdir())
        assert json.loads((fitted / name / "config.json").read_text())["training"]["seed"] == 0
        assert bool(list((fitted / name).glob("samples/*.png"))) == (name != "prior")
    assert {"cosine/mean", "cosine/linear", "cosine/one_step", "cosine/sampled", "cosine/two_samples"} <= set(
        json.loads((fitted / "prior" / "metrics.jsonl").read_text().splitlines()[-1])
    )


@pytest.mark.parametrize(("epochs", "steps"), [(0.6, 2), (1, 2), (1.5, 3), (9, 3)])
def test_a_set_is_passed_through_so_often_and_no_more(shards: Path, tmp_path: Path, epochs: float, steps: int) -> None:
    prior = {**PRIOR, "training": TRAINING | {"epochs": epochs}}  # at most 3 steps of 8; the set has 16 rows
    asked = run(shards, tmp_path / "run", config=parse_config(RunConfig, {**TINY, "prior": prior}, ""), only=("prior",))
    assert fit(asked, silent) and checkpoint.scalars(asked.out / "prior" / STATE)["step"] == steps
    lines: list[str] = []
    assert fit(replace(asked, resume=True), lines.append) and f"prior: all {steps} steps are done" in lines


def test_a_finished_model_of_another_version_is_refused_before_the_next_is_trained(
    shards: Path, fitted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(fitted, tmp_path / "old")
    weights = out / "prior" / WEIGHTS
    save_file({f"old.{name}": value for name, value in load_file(weights).items()}, weights)
    shutil.rmtree(out / "decoder")
    for only in (NAMES, ("decoder",)):
        with pytest.raises(HeadraceError, match=r"does not fit its config: it is of another version of the prior"):
            fit(run(shards, out, resume=True, only=only), silent)
    assert not (out / "decoder").exists()
    (out / "prior").rename(tmp_path / "away")  # the hint
    assert fit(run(shards, out, only=("prior",)), silent)
    assert (out / "prior" / WEIGHTS).read_bytes() == (fitted / "prior" / WEIGHTS).read_bytes()


def test_stopping_often_ends_where_not_stopping_does(shards: Path, fitted: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    calls = 0
    while not fit(run(shards, out, minutes=0.0, resume=calls > 0), silent):
        calls += 1
    assert calls == 8
    for name in NAMES:
        assert (out / name / WEIGHTS).read_bytes() == (fitted / name / WEIGHTS).read_bytes()
        whole, parts = (checkpoint.load(folder / name / STATE)[0] for folder in (fitted, out))
        assert set(whole) == set(parts) and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_two_processes_learn_what_one_does_and_stop_together(shards: Path, tmp_path: Path) -> None:
    """Parts are as large in both, so gradients, of which the first moment is a tenth, differ by rounding alone."""
    training = {**TRAINING, "optimizer": "adamw", "steps": 1}
    write_toml(tmp_path / "tiny.toml", {k: {**v, "dropout": 0.0, "training": training} for k, v in TINY.items()})
    trainer = Path(sys.executable).with_name("trainer")
    torchrun = [trainer.with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", trainer]

    def call(command: list[Path | str], out: str, *more: str) -> tuple[int, str]:
        line = [*command, "fit", "--shards", shards, "--config", tmp_path / "tiny.toml", "--out", tmp_path / out, *more]
        here = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # as torchrun's processes have
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, env=here, timeout=240)
        return done.returncode, done.stdout

    assert call([trainer], "one")[0] == 0
    code, said = call([*torchrun], "two", "--max-minutes", "0")
    assert code == 1 and said.count("the time was up") == 1
    assert (tmp_path / "two/prior" / STATE).is_file() and not (tmp_path / "two/decoder").exists()
    assert call([*torchrun], "two", "--resume")[0] == 0
    for name in NAMES:
        one, two = (checkpoint.load(tmp_path / place / name / STATE)[0] for place in ("one", "two"))
        moments = [key for key in one if key.endswith(".first")]
        assert set(one) == set(two) and len(moments) > 10 and any(one[key].any() for key in moments)
        for key in moments:
            torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=1e-3)


def test_a_killed_process_is_continued_to_the_same_end(shards: Path, tmp_path: Path) -> None:
    values = {"decoder": {**TINY["decoder"], "training": {**TRAINING, "steps": 20}}}  # a batch is two parts
    write_toml(tmp_path / "tiny.toml", values)
    config = parse_config(RunConfig, values, "tiny")
    assert fit(run(shards, tmp_path / "whole", config=config, only=("decoder",)), silent)
    asked = ["--shards", shards, "--out", tmp_path / "killed", "--config", tmp_path / "tiny.toml", "--only", "decoder"]
    command = [Path(sys.executable).with_name("trainer"), "fit", *asked]
    state = tmp_path / "killed" / "decoder" / STATE
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not state.is_file() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < checkpoint.load(state)[1]["step"] < 20
    assert fit(run(shards, tmp_path / "killed", config=config, only=("decoder",), resume=True), silent)
    whole, killed = (checkpoint.load(tmp_path / name / "decoder" / STATE)[0] for name in ("whole", "killed"))
    assert set(whole) == set(killed) and all(torch.equal(whole[key], killed[key]) for key in whole)


@pytest.mark.slow
def test_compiled_models_learn_alike(shards: Path, tmp_path: Path) -> None:
    for compiled in (False, True):
        training = {**TRAINING, "compile": compiled}
        values = {name: {**section, "dropout": 0.0, "training": training} for name, section in TINY.items()}
        fit(run(shards, tmp_path / str(compiled), config=parse_config(RunConfig, values, "tiny")), silent)
    for name in NAMES:
        plain, fast = (checkpoint.load(tmp_path / place / name / STATE)[0] for place in ("False", "True"))
        assert set(plain) == set(fast)
        for key in plain:
            torch.testing.assert_close(fast[key], plain[key], atol=5e-3, rtol=2e-2)


def test_ctrl_c_keeps_the_step_in_hand_and_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "steps": 100_000, "evaluate_every": 100_000}  # no state but what Ctrl-C leaves
    write_toml(tmp_path / "tiny.toml", {"decoder": {**TINY["decoder"], "training": training}})
    asked = ["--shards", shards, "--out", tmp_path / "run", "--config", tmp_path / "tiny.toml", "--only", "decoder"]
    command = [Path(sys.executable).with_name("trainer"), "fit", *asked]
    state = tmp_path / "run" / "decoder" / STATE
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not process.stderr.readline().startswith("decoder 10/") and process.poll() is None:
            pass
        assert not state.exists()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1].startswith("interrupted: ") and "--resume" in said
    assert "Traceback" not in said and checkpoint.scalars(state)["step"] >= 10


def test_pictures_and_texts_that_are_read_as_they_come_teach_the_same(
    shards: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures to the bit; texts but for the rounding of other batches of the CLIP."""
    monkeypatch.setattr("trainer.data.KEEP_DECODED", 0)
    monkeypatch.setattr("trainer.embedded.KEEP_TOKENS", 0)
    out = tmp_path / "streamed"
    calls = 0
    while not fit(run(shards, out, minutes=0.0, resume=calls > 0, only=("decoder", "upsampler")), silent):
        calls += 1
    assert calls == 5
    assert (out / "upsampler" / WEIGHTS).read_bytes() == (fitted / "upsampler" / WEIGHTS).read_bytes()
    streamed, kept = (load_model(folder, "decoder")[0].state_dict() for folder in (out, fitted))
    for name, value in kept.items():
        torch.testing.assert_close(streamed[name], value, atol=1e-3, rtol=1e-2)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert not fit(run(shards, out, minutes=0.0), silent)
    before = (out / "prior" / STATE).read_bytes()
    for room, file in ((100, "config.toml"), (4000, "model.safetensors")):
        with small_files(room), pytest.raises(HeadraceError, match=rf"cannot write .*{file}: file too large"):
            fit(run(shards, out, resume=True), silent)
        assert (out / "prior" / STATE).read_bytes() == before
    assert fit(run(shards, out, resume=True), silent)


def test_one_model_alone_is_the_same_model(shards: Path, fitted: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "one", only=("decoder",)), silent)
    assert (tmp_path / "one/decoder" / WEIGHTS).read_bytes() == (fitted / "decoder" / WEIGHTS).read_bytes()
    with pytest.raises(HeadraceError, match="has no trained prior") as caught:
        load_model(tmp_path / "one", "prior")
    assert caught.value.code == 3 and "--only prior" in (caught.value.hint or "")


def test_runs_are_not_mixed(shards: Path, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="already holds a prior"):
        fit(run(shards, fitted), silent)
    with pytest.raises(HeadraceError, match="nothing to resume"):
        fit(run(shards, tmp_path / "none", resume=True), silent)
    with pytest.raises(HeadraceError, match="another config") as caught:
        fit(run(shards, fitted, resume=True, seed=1), silent)
    assert caught.value.code == 4
    assert fit(run(shards, fitted, resume=True), silent)  # all done: nothing happens


def test_a_refused_run_changes_nothing_of_the_one_there(shards: Path, fitted: Path, tmp_path: Path, clip: Clip) -> None:
    def told() -> list[str]:
        return [(fitted / name).read_text() for name in ("run.json", "config.toml")]

    before = told()
    with pytest.raises(HeadraceError, match="another config"):
        fit(run(write_packed(tmp_path / "other", rows=12, clip=clip), fitted, resume=True), silent)
    facts = json.loads(before[0])
    foreign = {**facts, "identity": {**facts["identity"], "weights_sha256": "0" * 64}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(foreign))
    with pytest.raises(HeadraceError, match="models of another CLIP") as caught:
        fit(run(shards, tmp_path / "out", only=("decoder",)), silent)
    assert caught.value.code == 4
    assert told() == before


def test_what_cannot_be_trained_on_is_one_sentence(shards: Path, tmp_path: Path, clip: Clip) -> None:
    with pytest.raises(HeadraceError, match="only one sample"):
        fit(run(write_packed(tmp_path / "one", rows=1, clip=clip), tmp_path / "a"), silent)
    with pytest.raises(HeadraceError, match="is no packed set"):
        fit(run(tmp_path / "nowhere", tmp_path / "b"), silent)
    packed = write_packed(tmp_path / "noval", clip=clip)
    for path in (packed / "val").iterdir():
        path.unlink()
    with pytest.raises(HeadraceError, match="no samples in val"):
        fit(run(packed, tmp_path / "c"), silent)
    packed = write_packed(tmp_path / "cut", clip=clip)
    tar = packed / "train" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(HeadraceError, match="cut short"):
        fit(run(packed, tmp_path / "d", only=("decoder",)), silent)
    odd = parse_config(RunConfig, {**TINY, "decoder": {**TINY["decoder"], "side": 18}}, "odd")
    with pytest.raises(HeadraceError, match=r"decoder\.side 18 is not a multiple of 4"):
        fit(run(shards, tmp_path / "e", config=odd, only=("decoder",)), silent)
    odd = parse_config(RunConfig, {**TINY, "decoder": {**TINY["decoder"], "attention": [5]}}, "odd")
    with pytest.raises(HeadraceError, match=r"decoder\.attention 5 is the side of no grid") as caught:
        fit(run(shards, tmp_path / "g", config=odd, only=("decoder",)), silent)
    assert caught.value.hint == "choose among 8, 4"
    odd = parse_config(RunConfig, {**TINY, "decoder": {**TINY["decoder"], "head": 10}}, "odd")
    with pytest.raises(HeadraceError, match=r"decoder\.head 10 does not divide the 32 channels"):
        fit(run(shards, tmp_path / "h", config=odd, only=("decoder",)), silent)
    odd = parse_config(RunConfig, {"prior": {"kind": "transformer", "width": 40, "head": 16}}, "odd")
    with pytest.raises(HeadraceError, match=r"prior\.width 40 is not a multiple of prior\.head 16"):
        fit(run(shards, tmp_path / "i", config=odd, only=("prior",)), silent)
    odd = parse_config(RunConfig, {**TINY, "upsampler": {**TINY["upsampler"], "factor": 3}}, "odd")
    with pytest.raises(HeadraceError, match=r"upsampler\.side 32 is not a multiple of 12"):
        fit(run(shards, tmp_path / "j", config=odd, only=("upsampler",)), silent)


def test_a_decoder_and_an_upsampler_that_do_not_fit_each_other_are_refused_before_training(
    shards: Path, fitted: Path, tmp_path: Path
) -> None:
    small = parse_config(RunConfig, {**TINY, "decoder": {**TINY["decoder"], "side": 8, "attention": []}}, "small")
    with pytest.raises(
        HeadraceError, match=r"decoder\.side is 8, but the upsampler takes 16 \(its side 32 / "
    ) as caught:
        fit(run(shards, tmp_path / "a", config=small), silent)
    assert "upsampler.factor" in str(caught.value.hint) and not (tmp_path / "a").exists()
    shutil.copytree(fitted / "upsampler", tmp_path / "b" / "upsampler")  # trained before
    with pytest.raises(HeadraceError, match=r"decoder\.side is 8, but"):
        fit(run(shards, tmp_path / "b", config=small, only=("decoder",)), silent)
    assert fit(run(shards, tmp_path / "c", config=small, only=("decoder",)), silent)


def test_a_set_of_one_caption_can_be_trained_on(tmp_path: Path, clip: Clip) -> None:
    one = write_packed(tmp_path / "one", ["a photo of sks dog"] * 16, clip=clip)
    assert fit(run(one, tmp_path / "run", only=("prior",)), silent)
    linear = parse_config(RunConfig, {"prior": {"kind": "linear"}}, "linear")
    lines: list[str] = []
    assert fit(run(one, tmp_path / "linear", config=linear, only=("prior",)), lines.append)
    figures = dict(re.findall(r"cosine/(\w+) (\S+)", lines[-1]))
    assert figures["linear"] == figures["mean"]  # its text tells nothing


def test_models_of_two_sets_do_not_share_a_run(shards: Path, tmp_path: Path, clip: Clip) -> None:
    assert fit(run(shards, tmp_path / "run", only=("prior",)), silent)
    before = (tmp_path / "run/run.json").read_text()
    other = write_packed(tmp_path / "other", rows=12, clip=clip)
    with pytest.raises(HeadraceError, match="holds models of another set") as caught:
        fit(run(other, tmp_path / "run", only=("decoder",)), silent)
    assert caught.value.code == 4 and (tmp_path / "run/run.json").read_text() == before
    for file in (WEIGHTS, STATE):  # stopped before anything was kept: nothing is mixed
        (tmp_path / "run/prior" / file).unlink()
    assert fit(run(other, tmp_path / "run", only=("prior",)), silent)


def test_what_can_be_seen_before_training_is_said_before_it(shards: Path, tmp_path: Path, clip: Clip) -> None:
    lost = write_packed(tmp_path / "lost", clip=clip)
    (lost / "val" / "00000.tar").unlink()
    other = write_packed(tmp_path / "other", clip=clip)
    about = json.loads((other / "dataset.json").read_text())
    about["clip"]["weights_sha256"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(about))

    def changed(**values: object) -> RunConfig:
        return parse_config(RunConfig, {**TINY, "upsampler": {**TINY["upsampler"], **values}}, "odd")

    config = parse_config(RunConfig, TINY, "tiny")
    for said, folder, settings in (
        (r"00000\.tar cannot be read: no such file", lost, config),
        ("are of other weights than those of CLIP mini", other, config),
        (r"upsampler\.groups 7 does not divide the 16 channels", shards, changed(groups=7)),
        ("a batch of 8 cannot be shared among 1 × 3", shards, changed(training={**TRAINING, "part": 3})),
    ):
        with pytest.raises(HeadraceError, match=said):
            fit(run(folder, tmp_path / "out", config=settings), silent)
        assert not (tmp_path / "out").exists()


def test_a_linear_prior_is_not_overwritten_unasked(shards: Path, tmp_path: Path) -> None:
    asked = run(shards, tmp_path / "a", config=parse_config(RunConfig, {"prior": {"kind": "linear"}}, "linear"))
    assert fit(replace(asked, only=("prior",)), silent)
    with pytest.raises(HeadraceError, match="already holds a prior"):
        fit(replace(asked, only=("prior",)), silent)


def test_a_damaged_model_is_named(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "decoder", tmp_path / "decoder")
    (tmp_path / "decoder" / WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(HeadraceError, match="does not fit its config") as caught:
        load_model(tmp_path, "decoder")
    assert caught.value.code == 4
