"""What the three models learn: each by its own draws and losses, measured against a known answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from pipeline.base import parse_config
from pipeline.clip import Clip
from pipeline.shards import vector_column, write_parquet
from tests.trainer.tiny_run import UNET, run, silent
from trainer import diffusion
from trainer.cascade import DEFAULT, How, Words, decoder_denoise, decoder_noise, draw, enlarge
from trainer.decoder import Decoder, DecoderConfig
from trainer.fit import RunConfig, fit
from trainer.layers import blur
from trainer.loop import Loop
from trainer.prior import PriorConfig, ResidualPrior
from trainer.prior_cosines import prior_cosines
from trainer.saved import load_model
from trainer.sets import Sets, Split
from trainer.task import Place, Plan, Training
from trainer.tasks import DecoderTask, PriorTask, UpsamplerTask, as_floats
from trainer.upsampler import Upsampler, UpsamplerConfig, shrunk

CPU = Place(torch.device("cpu"), half=False)


def sets(shards: Path, clip: Clip) -> Sets:
    return Sets(Split(shards, "train", clip), Split(shards, "val", clip), clip)


def test_measured_shares_of_what_is_dropped_and_when_are_those_of_the_config(
    shards: Path, clip: Clip, tmp_path: Path
) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": (), "drop_image": 0.1, "drop_text": 0.5})  # type: ignore[arg-type]
    task = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    draw = task.draw(20_000, torch.Generator().manual_seed(0))
    kept = [float(draw[name].float().mean()) for name in ("keep_image", "keep_text")]
    assert kept == pytest.approx([0.9, 0.5], abs=0.012)
    both = float((~draw["keep_image"] & ~draw["keep_text"]).float().mean())
    assert both == pytest.approx(0.05, abs=0.006)  # Ramesh et al. 2022: dropped apart from each other
    prior = PriorTask(PriorConfig(width=16, depth=1, noise_only=0.25), sets(shards, clip), tmp_path, 0)
    drawn = prior.draw(20_000, torch.Generator())
    last = drawn["t"] == 999
    assert float(drawn["keep_text"].float().mean()) == pytest.approx(0.9, abs=0.01)
    assert float(last.float().mean()) == pytest.approx(0.25 + 0.75 / 1000, abs=0.012)
    assert float(drawn["keep_text"][last].float().mean()) == pytest.approx(0.9, abs=0.02)
    assert float(draw["t"].float().mean()) == pytest.approx(499.5, abs=8)
    some = task.draw(10, torch.Generator().manual_seed(0))["t"]  # one of each tenth of the schedule, shuffled
    assert sorted((some // 100).tolist()) == list(range(10)) and some.tolist() != sorted(some.tolist())
    many = torch.cat([task.draw(10, torch.Generator().manual_seed(n))["t"] for n in range(3000)])
    counts = torch.bincount(many // 50, minlength=20)  # within a tenth all are as likely
    assert counts.sum() == 30_000 and int(counts.min()) > 1350 and int(counts.max()) < 1650


@pytest.mark.parametrize("middle", [0.5, 1.0])
def test_a_share_of_a_decoders_timesteps_is_logit_normal(
    middle: float, shards: Path, clip: Clip, tmp_path: Path
) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": (), "middle": middle})  # type: ignore[arg-type]
    task = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    times = (task.draw(40_000, torch.Generator().manual_seed(0))["t"].double() + 0.5) / 1000
    for bound in (0.05, 0.3, 0.5, 0.9):
        logit_normal = float(torch.special.ndtr(torch.logit(torch.tensor(bound))))
        assert float((times < bound).double().mean()) == pytest.approx(
            middle * logit_normal + (1 - middle) * bound, abs=0.003
        )


def test_logit_normal_timesteps_are_one_of_each_equally_likely_part(shards: Path, clip: Clip, tmp_path: Path) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": (), "middle": 1.0})  # type: ignore[arg-type]
    task = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    times = (task.draw(10, torch.Generator().manual_seed(0))["t"].double() + 0.5) / 1000
    parts = torch.special.ndtr(torch.logit(times)) * 10
    assert sorted(parts.long().tolist()) == list(range(10))
    many = torch.logit((task.draw(20_000, torch.Generator().manual_seed(0))["t"].double() + 0.5) / 1000)
    assert float(many.mean()) == pytest.approx(0, abs=0.02) and float(many.std()) == pytest.approx(1, abs=0.02)


class Spied(Exception):
    """Carries what a loss hands to its network."""


def spied(*inputs: torch.Tensor) -> torch.Tensor:
    raise Spied(inputs)


def test_networks_get_what_was_drawn_and_the_null_is_the_clips_empty_text(
    shards: Path, clip: Clip, tmp_path: Path
) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": ()})  # type: ignore[arg-type]
    decoder = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    prior = PriorTask(PriorConfig(width=16, depth=1), sets(shards, clip), tmp_path, 0)
    generator = torch.Generator().manual_seed(0)
    for task, kept in ((decoder, ("keep_image", "keep_text")), (prior, ("keep_text",))):
        draw = task.draw(16, generator)
        with pytest.raises(Spied) as caught:
            task.losses(spied, task.read(np.arange(16)), draw)
        inputs = caught.value.args[0]
        for given, name in zip(inputs[-len(kept) :], kept, strict=True):
            assert torch.equal(given, draw[name]) and 0 < int(given.sum()) < 16
    empty, mask = clip.text_states([""])
    for null in (decoder.decoder.null, prior.prior.null):
        torch.testing.assert_close(null.tokens, torch.from_numpy(empty[0][mask[0]]))
        torch.testing.assert_close(null.embedding, torch.from_numpy(clip.encode_texts([""])[0]))


def test_a_decoder_learns_edges_too_and_is_judged_by_pixels_alone(shards: Path, clip: Clip, tmp_path: Path) -> None:
    config = DecoderConfig(**{**UNET, "side": 16, "attention": (), "edges": 0.5})  # type: ignore[arg-type]
    task = DecoderTask(config, sets(shards, clip), tmp_path, 0)
    batch, draw = task.read(np.arange(16)), task.draw(16, torch.Generator().manual_seed(0))
    x0 = as_floats(batch["picture"])
    learned, judged = (task.losses(task.model.train(training), batch, draw) for training in (True, False))
    weight = diffusion.weights(diffusion.cosine(), "x0", "v")[draw["t"]]
    torch.testing.assert_close(judged, weight * x0.square().flatten(1).mean(1))  # a fresh network answers 0
    torch.testing.assert_close(learned, judged + 0.5 * weight * diffusion.edge_error(x0))


def test_the_upsampler_learns_from_what_was_blurred_and_noised(shards: Path, clip: Clip, tmp_path: Path) -> None:
    config = UpsamplerConfig(**{**UNET, "side": 32, "factor": 2, "crop": 32, "blur": 0.5})  # type: ignore[arg-type]
    task = UpsamplerTask(config, sets(shards, clip), tmp_path, 0)
    batch, draw = task.read(np.arange(16)), task.draw(16, torch.Generator().manual_seed(0))
    with pytest.raises(Spied) as caught, torch.autocast("cpu", torch.bfloat16):
        task.losses(spied, batch, draw)
    small = caught.value.args[0][2]
    plain = blur(shrunk(as_floats(batch["picture"]), 2), 3, 0.5)
    torch.testing.assert_close(small, plain + draw["strength"][:, None, None, None] * draw["noise"])


def test_rows_are_weighted_as_the_set_says(shards: Path, clip: Clip, tmp_path: Path) -> None:
    given = sets(shards, clip)
    weights = given.train.embeddings.weight
    weights[:] = np.where(np.arange(16) % 2, 3.0, 1.0)
    task = DecoderTask(DecoderConfig(**{**UNET, "side": 16, "attention": ()}), given, tmp_path, 0)  # type: ignore[arg-type]
    loop = Loop(task, Plan(tmp_path, Training(batch=16, part=16), 0, "", False, None), CPU, silent)
    drawn = np.bincount(np.concatenate([loop._rows(step) for step in range(200)]), minlength=16)
    assert drawn[1::2].sum() == pytest.approx(3 * drawn[::2].sum(), rel=0.03)


def test_a_decoder_that_learned_sixteen_pictures_draws_them_by_their_conditions(
    shards: Path, clip: Clip, tmp_path: Path
) -> None:
    training = {"batch": 32, "part": 32, "steps": 160, "warmup": 10, "ema": 0.95, "evaluate_every": 160}
    decoder = {**UNET, "channels": [32, 48], "side": 16, "attention": [], "groups": 0, "drop_text": 0.1}
    config = parse_config(RunConfig, {"decoder": {**decoder, "training": training}}, "overfit")
    fit(run(shards, tmp_path / "run", config=config, only=("decoder",)), silent)
    model, saved = load_model(tmp_path / "run", "decoder")
    assert isinstance(saved, DecoderConfig) and isinstance(model, Decoder)
    task = DecoderTask(saved, sets(shards, clip), tmp_path, 0)
    batch = task.read(np.arange(16))
    true, keep = as_floats(batch["picture"]), torch.ones(16, dtype=torch.bool)

    def drawn(shift: int) -> torch.Tensor:
        image, tokens, mask = (batch[name].roll(shift, 0) for name in ("image", "tokens", "mask"))
        denoise = decoder_denoise(model, image, Words(image, tokens, mask), DEFAULT)
        with torch.no_grad():
            return draw(denoise, decoder_noise(model, range(16), torch.device("cpu")), DEFAULT)

    own, others = ((drawn(shift) - true).square().mean() for shift in (0, 5))
    assert float(own) < 0.1 and float(others) > 4 * float(own)

    drawn_for = task.draw(16, torch.Generator().manual_seed(0)) | {"keep_image": keep, "keep_text": keep}

    def loss(*shuffled: str) -> float:
        given = {**batch, **{name: batch[name].roll(5, 0) for name in shuffled}}
        with torch.no_grad():
            return float(task.losses(model, given, drawn_for).mean())

    assert loss("image", "tokens", "mask") > 1.5 * loss()
    assert loss("image") > 1.1 * loss() and loss("tokens", "mask") > 1.1 * loss()  # each by itself is listened to


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
    given = sets(tmp_path / "set", clip)
    task, (model, _) = PriorTask(config.prior, given, tmp_path, 0), load_model(tmp_path / "a", "prior")
    held, t = task.held_out(), torch.full((300,), 900)
    drawn = task.draw(300, torch.Generator().manual_seed(0)) | {"t": t, "keep_text": torch.ones(300, dtype=torch.bool)}
    other = {**held, **{name: held[name].roll(1, 0) for name in ("text", "tokens", "mask")}}
    with torch.no_grad():
        right, wrong = (float(task.losses(model, rows, drawn).mean()) for rows in (held, other))
    assert wrong > 1.5 * right
    if kind == "residual":  # samples of a text differ as its pictures do: E x·x' = |E x|², where |E x| = E x·m/|m|
        assert last["cosine/two_samples"] == pytest.approx(last["cosine/one_step"] ** 2, abs=0.08)
        prior, val = load_model(tmp_path / "a", "prior")[0], Split(tmp_path / "set", "val", clip)
        assert isinstance(prior, ResidualPrior)
        words = Words(val.vectors("text", val.rows), torch.zeros(300, 0, 1), torch.zeros(300, 0, dtype=torch.bool))
        plain = prior_cosines(prior, words, val.vectors("image", val.rows), {}, 0, How(prior_guidance=1))
        assert plain["two_samples"] == pytest.approx(plain["one_step"] ** 2, abs=0.04)


def test_the_linear_prior_is_done_at_once(shards: Path, tmp_path: Path) -> None:
    config = parse_config(RunConfig, {"prior": {"kind": "linear"}}, "linear")
    assert fit(run(shards, tmp_path / "a", config=config, only=("prior",)), silent)
    model, _ = load_model(tmp_path / "a", "prior")
    assert not list(model.parameters()) and bool(model.state_dict()["weight"].any())


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
