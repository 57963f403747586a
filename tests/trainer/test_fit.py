"""Fitting all three models: they learn and use their conditions, resume exactly, and bad input is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from pipeline.base import HeadraceError, parse_config, write_toml
from pipeline.clip import Clip, load
from pipeline.shards import vector_column, write_parquet
from tests.trainer.packed import write_packed
from trainer import checkpoint, diffusion, sampling
from trainer.cascade import DEFAULT, enlarge
from trainer.config import SHIPPED, read_run_config
from trainer.decoder import DecoderConfig
from trainer.fit import FitRun, RunConfig, fit
from trainer.loop import STATE
from trainer.prior import PriorConfig
from trainer.saved import NAMES, WEIGHTS, load_model, read_run
from trainer.sets import Sets, Split
from trainer.tasks import DecoderTask, PriorTask, UpsamplerTask, as_floats
from trainer.upsampler import Upsampler, UpsamplerConfig, shrunk

TRAINING = {"batch": 8, "part": 4, "steps": 3, "warmup": 1, "evaluate_every": 2}
UNET = {"channels": [16, 32], "blocks": 1, "groups": 8, "head": 16, "patch": 2}
TINY = {
    "prior": {"width": 32, "depth": 1, "training": TRAINING},
    "decoder": {**UNET, "side": 16, "attention": [4], "token_width": 24, "dropout": 0.1, "training": TRAINING},
    "upsampler": {**UNET, "side": 32, "factor": 2, "crop": 16, "training": TRAINING},
}


def silent(line: str) -> None:
    del line


def run(shards: Path, out: Path, **changes: object) -> FitRun:
    return replace(FitRun(shards, out, parse_config(RunConfig, TINY, "tiny")), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"), clip=clip)


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
        assert {"loss", "samples_per_s", "mfu", "held_out/loss_t50", "held_out/raw_loss_t50"} <= names
        assert list((fitted / name / "tensorboard").iterdir())
        assert bool(list((fitted / name).glob("samples/*.png"))) == (name != "prior")
    assert {"cosine/mean", "cosine/linear", "cosine/one_step", "cosine/sampled"} <= set(
        json.loads((fitted / "prior" / "metrics.jsonl").read_text().splitlines()[-1])
    )


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
        here = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
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
    values = {"decoder": {**TINY["decoder"], "training": {**TRAINING, "steps": 60}}}  # a batch is two parts
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
    assert 0 < checkpoint.load(state)[1]["step"] < 60
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
    packed = write_packed(tmp_path / "lost", clip=clip)
    (packed / "val" / "00000.tar").unlink()
    with pytest.raises(HeadraceError, match=r"00000\.tar cannot be read: no such file"):
        fit(run(packed, tmp_path / "lost-run"), silent)
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
    odd = parse_config(RunConfig, {**TINY, "decoder": {**TINY["decoder"], "groups": 7}}, "odd")
    with pytest.raises(HeadraceError, match="cannot be built"):
        fit(run(shards, tmp_path / "f", config=odd, only=("decoder",)), silent)


def test_a_damaged_model_is_named(fitted: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(fitted / "decoder", tmp_path / "decoder")
    (tmp_path / "decoder" / WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(HeadraceError, match="does not fit its config") as caught:
        load_model(tmp_path, "decoder")
    assert caught.value.code == 4


def sets(shards: Path, clip: Clip) -> Sets:
    return Sets(Split(shards, "train", clip), Split(shards, "val", clip), clip)


def test_measured_drop_rates_are_those_of_the_config(shards: Path, clip: Clip, tmp_path: Path) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": (), "drop_image": 0.1, "drop_text": 0.5})  # type: ignore[arg-type]
    task = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    draw = task.draw(20_000, torch.Generator().manual_seed(0))
    kept = [float(draw[name].float().mean()) for name in ("keep_image", "keep_text")]
    assert kept == pytest.approx([0.9, 0.5], abs=0.012)
    both = float((~draw["keep_image"] & ~draw["keep_text"]).float().mean())
    assert both == pytest.approx(0.05, abs=0.006)  # Ramesh et al. 2022: dropped apart from each other
    prior = PriorTask(PriorConfig(width=16, depth=1), sets(shards, clip), tmp_path, 0)
    assert float(prior.draw(20_000, torch.Generator())["keep_text"].float().mean()) == pytest.approx(0.9, abs=0.01)
    assert float(draw["t"].float().mean()) == pytest.approx(499.5, abs=8)
    some = task.draw(10, torch.Generator().manual_seed(0))["t"]  # one of each tenth of the schedule, shuffled
    assert sorted((some // 100).tolist()) == list(range(10)) and some.tolist() != sorted(some.tolist())
    many = torch.cat([task.draw(10, torch.Generator().manual_seed(n))["t"] for n in range(3000)])
    counts = torch.bincount(many // 50, minlength=20)  # within a tenth all are as likely
    assert counts.sum() == 30_000 and int(counts.min()) > 1350 and int(counts.max()) < 1650


def test_a_decoder_that_learned_sixteen_pictures_draws_them_by_their_conditions(
    shards: Path, clip: Clip, tmp_path: Path
) -> None:
    training = {"batch": 32, "part": 32, "steps": 160, "warmup": 10, "ema": 0.95, "evaluate_every": 160}
    decoder = {**UNET, "channels": [32, 48], "side": 16, "attention": [], "groups": 0, "drop_text": 0.1}
    config = parse_config(RunConfig, {"decoder": {**decoder, "training": training}}, "overfit")
    fit(run(shards, tmp_path / "run", config=config, only=("decoder",)), silent)
    model, saved = load_model(tmp_path / "run", "decoder")
    assert isinstance(saved, DecoderConfig)
    task = DecoderTask(saved, sets(shards, clip), tmp_path, 0)
    batch = task.read(np.arange(16))
    true, keep = as_floats(batch["picture"]), torch.ones(16, dtype=torch.bool)
    schedule = diffusion.cosine()

    def drawn(shift: int) -> torch.Tensor:
        known = [batch[name].roll(shift, 0) for name in ("image", "tokens", "mask")]
        noise = sampling.noise_for(range(16), (3, 16, 16))()
        with torch.no_grad():
            return sampling.ddim(
                lambda xt, t: model(xt, t, *known, keep, keep).clamp(-1, 1), noise, schedule, sampling.steps(1000, 20)
            )

    own, others = ((drawn(shift) - true).square().mean() for shift in (0, 5))
    assert float(own) < 0.1 and float(others) > 4 * float(own)

    draw = task.draw(16, torch.Generator().manual_seed(0)) | {"keep_image": keep, "keep_text": keep}
    swapped = {**batch, **{name: batch[name].roll(5, 0) for name in ("image", "tokens", "mask")}}
    with torch.no_grad():
        right, wrong = (task.losses(model, given, draw).mean() for given in (batch, swapped))
    assert float(wrong) > 1.5 * float(right)


def bent_vectors(folder: Path, clip: Clip) -> Path:
    """A set whose picture vectors depend on text vectors in a way that no line follows."""
    for split, rows, seed in (("train", 3000, 0), ("val", 300, 1)):
        rng = np.random.default_rng(seed)
        hidden = rng.standard_normal((rows, 4))
        bent = np.concatenate([hidden[:, :2], np.abs(hidden), 2 * np.sign(hidden[:, :1] * hidden[:, 1:2])], axis=1)
        columns: dict[str, object] = {"key": [str(n) for n in range(rows)], "caption": ["words"] * rows}
        columns |= {"offset": [0] * rows, "length": [0] * rows}
        for name, values in (("text_emb", hidden), ("image_emb", bent)):
            wide = values @ np.random.default_rng(2).standard_normal((values.shape[1], clip.dimension))
            unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
            columns[name] = vector_column(unit, np.ones(rows, bool))
        write_parquet(pa.table(columns), folder / split / "00000.parquet")
    (folder / "dataset.json").write_text(json.dumps({"format_version": 1, "clip": clip.identity}))
    return folder


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_a_learned_prior_beats_the_linear_one_which_beats_the_mean(tmp_path: Path, clip: Clip, kind: str) -> None:
    training = {"batch": 64, "part": 64, "steps": 120, "optimizer": "adamw", "learning_rate": 2e-3, "ema": 0.97}
    prior = {"kind": kind, "width": 64, "depth": 2, "training": {**training, "warmup": 10, "evaluate_every": 120}}
    config = parse_config(RunConfig, {"prior": prior}, "prior")
    fit(run(bent_vectors(tmp_path / "set", clip), tmp_path / "a", config=config, only=("prior",)), silent)
    last = json.loads((tmp_path / "a/prior/metrics.jsonl").read_text().splitlines()[-1])
    assert last["cosine/one_step"] > last["cosine/linear"] + 0.02 > last["cosine/mean"] + 0.1


def test_the_linear_prior_is_done_at_once(shards: Path, tmp_path: Path) -> None:
    config = parse_config(RunConfig, {"prior": {"kind": "linear"}}, "linear")
    assert fit(run(shards, tmp_path / "a", config=config, only=("prior",)), silent)
    model, _ = load_model(tmp_path / "a", "prior")
    assert not list(model.parameters()) and bool(model.state_dict()["weight"].any())


def test_shipped_configs_are_valid_and_changes_are_checked() -> None:
    for shipped in SHIPPED.glob("*.toml"):
        assert read_run_config(shipped.stem) == read_run_config(str(shipped))
    changed = read_run_config("mini", ["decoder.training.steps=7", "prior.kind=linear", "decoder.channels=[32, 64]"])
    assert changed.decoder.training.steps == 7 and changed.prior.kind == "linear"
    assert changed.decoder.channels == (32, 64)
    for change, match in (
        ("decoder.chanels=3", "did you mean `channels`"),
        ("decoder.side", "is no assignment"),
        ("decoder.side.x=3", "is no section"),
        ("decoder.training.steps=0", "greater than or equal to 1"),
    ):
        with pytest.raises(HeadraceError, match=match):
            read_run_config("mini", [change])
    with pytest.raises(HeadraceError, match="no config nothing"):
        read_run_config("nothing")


def test_an_upsampler_that_learned_sixteen_pictures_comes_nearer_than_bicubic(
    shards: Path, clip: Clip, tmp_path: Path
) -> None:
    training = {"batch": 32, "part": 32, "steps": 150, "warmup": 10, "ema": 0.95, "evaluate_every": 150}
    upsampler = {**UNET, "side": 32, "factor": 2, "crop": 16, "groups": 0, "training": training}
    config = parse_config(RunConfig, {"upsampler": upsampler}, "upsampler")
    fit(run(shards, tmp_path / "run", config=config, only=("upsampler",)), silent)
    model, saved = load_model(tmp_path / "run", "upsampler")
    assert isinstance(saved, UpsamplerConfig) and isinstance(model, Upsampler)
    true = as_floats(UpsamplerTask(saved, sets(shards, clip), tmp_path, 0).held_out()["picture"])
    small = shrunk(true, 2)
    with torch.no_grad():
        drawn = enlarge(model, small, range(len(true)), DEFAULT)
    plain = F.interpolate(small, scale_factor=2.0, mode="bicubic", align_corners=False).clamp(-1, 1)
    ours, bicubic = (float((large - true).square().mean()) for large in (drawn, plain))
    assert ours < 0.8 * bicubic
