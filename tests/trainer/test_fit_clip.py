"""Training a CLIP: it learns, it resumes exactly, and its output is what open_clip and transformers load."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.base import HeadraceError, parse_config
from pipeline.clip import load
from tests.trainer.packed import COLOURS, pictures_and_captions, small_files, with_column, write_packed
from trainer import checkpoint
from trainer.cli import main
from trainer.clip_files import WEIGHTS
from trainer.clip_run import LOGS, STATE, Run
from trainer.config import CLIP_DEFAULT, ClipConfig, read_clip_config
from trainer.contrast import centre_loss, encode_texts, threshold_loss
from trainer.fit_clip import fit
from trainer.log import METRICS
from trainer.optim import MuonAdamW
from trainer.teach_words import teach

TINY = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    "training": {"batch": 6, "steps": 8, "warmup": 2, "evaluate_every": 3},
}


def tiny(**training: object) -> ClipConfig:
    return parse_config(ClipConfig, {**TINY, "training": {**TINY["training"], **training}}, "tiny")  # type: ignore[dict-item]


def run(shards: Path, out: Path, config: ClipConfig | None = None, **changes: object) -> Run:
    values = {"seed": 1, "resume": False, "minutes": None, **changes}
    return Run((shards,), out, config or tiny(), **values)  # type: ignore[arg-type]


def silent(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / LOGS / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_s"} for line in lines]


def test_stopping_often_ends_where_not_stopping_does(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "whole"), silent)
    assert not fit(run(shards, tmp_path / "parts", minutes=0.0), silent)  # one step, then stopped
    for _ in range(7):
        fit(run(shards, tmp_path / "parts", minutes=0.0, resume=True), silent)
    whole, scalars = checkpoint.load(tmp_path / "whole" / STATE)
    parts, other = checkpoint.load(tmp_path / "parts" / STATE)
    assert scalars["step"] == other["step"] == 8 and set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(name.startswith("optimizer.") for name in whole)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "parts" / WEIGHTS).read_bytes()


def test_a_kill_between_checkpoints_changes_nothing(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "whole"), silent)
    real, calls = MuonAdamW.step, [0]

    def dies(self: MuonAdamW, closure: None = None) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MuonAdamW, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(run(shards, tmp_path / "killed"), silent)
    fit(run(shards, tmp_path / "killed", resume=True), silent)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "killed" / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_another_seed_gives_another_clip(shards: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        fit(run(shards, tmp_path / str(seed), tiny(steps=1), seed=seed), silent)
    assert (tmp_path / "1" / WEIGHTS).read_bytes() != (tmp_path / "2" / WEIGHTS).read_bytes()


def test_it_learns_and_scores_what_it_learned(tmp_path: Path) -> None:
    shards = write_packed(tmp_path / "set")
    config = tiny(batch=16, steps=120, warmup=10, evaluate_every=120, learning_rate=3e-3, ema=0.9)
    assert fit(run(shards, tmp_path / "out", config), silent)
    assert [line["0-set/auc"] for line in metrics(tmp_path / "out") if "0-set/auc" in line][-1] > 0.9
    pictures, captions = pictures_and_captions()
    clip = load(str(tmp_path / "out"), device="cpu")
    from simplejpeg import decode_jpeg

    cosine = clip.encode_images([decode_jpeg(p) for p in pictures]) @ clip.encode_texts(captions).T
    assert (cosine.argmax(axis=1) == np.arange(16)).mean() > 0.5  # chance is 1 in 16
    names = {key for line in metrics(tmp_path / "out") for key in line}
    assert {"loss", "rate"} <= names and any(name.endswith("/auc") for name in names)
    assert list((tmp_path / "out" / "training" / "tensorboard").iterdir())


def test_plain_open_clip_loads_what_is_written(shards: Path, tmp_path: Path) -> None:
    import open_clip

    fit(run(shards, tmp_path / "out", tiny(steps=1)), silent)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a red circle"])
    with torch.inference_mode():
        expected = model.eval().encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(load(str(tmp_path / "out")).encode_texts(["a red circle"]), expected, atol=1e-6)
    assert transform is not None and "trainer clip" in (tmp_path / "out" / "README.md").read_text()


def test_rates_warm_up_and_end_at_nothing_and_gradients_are_clipped(shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    real = MuonAdamW.step

    def spied(self: MuonAdamW, closure: None = None) -> None:
        squares = [p.grad.square().sum() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(
            (self.param_groups[0]["lr"] / self.param_groups[0]["peak"], float(torch.stack(squares).sum().sqrt()))
        )
        real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MuonAdamW, "step", spied)
        fit(run(shards, tmp_path / "out", tiny(clip_norm=0.5)), silent)
    rates, norms = zip(*seen, strict=True)
    cosine = [0.5 * (1 + math.cos(math.pi * done / 6)) for done in range(6)]
    assert rates == pytest.approx((0.5, 1.0, *cosine))
    assert max(norms) <= 0.5 + 1e-4
    lines = metrics(tmp_path / "out")
    assert max(line["norm"] for line in lines if "norm" in line) > 0.5


def test_half_of_the_running_average_is_written(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "out", tiny(ema=0.5)), silent)
    state, _ = checkpoint.load(tmp_path / "out" / STATE)
    written = load_file(tmp_path / "out" / WEIGHTS)
    raw, average = (checkpoint.section(state, part) for part in ("model", "average"))
    name = "visual.conv1.weight"
    assert written[name].dtype == torch.float16 and torch.equal(written[name], average[name].half())
    assert not torch.equal(average[name], raw[name])


def test_ctrl_c_keeps_the_step_in_hand(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "whole"), silent)
    real, calls = MuonAdamW.step, [0]

    def interrupted(self: MuonAdamW, closure: None = None) -> None:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MuonAdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(run(shards, tmp_path / "out"), silent)
    assert checkpoint.load(tmp_path / "out" / STATE)[1]["step"] == 2
    assert fit(run(shards, tmp_path / "out", resume=True), silent)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_the_command_trains_and_says_when_the_time_was_up(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    asked = ["--shards", shards, "--config", tmp_path / "tiny.json", "--out", tmp_path / "out", "--seed", "1"]
    said = []
    for more in (["--max-minutes", "0"], ["--resume"]):
        monkeypatch.setattr("sys.argv", ["trainer", "clip", *map(str, asked), *more])
        with pytest.raises(SystemExit) as caught:
            main()
        said.append((int(caught.value.code or 0), capsys.readouterr().out.strip()))
    assert said == [(1, f"{tmp_path / 'out'}: the time was up; continue with --resume"), (0, str(tmp_path / "out"))]
    fit(run(shards, tmp_path / "whole"), silent)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def taught(folder: Path) -> Path:
    """The small set with a teacher that tells the colours of both halves."""
    values = np.array([[*COLOURS[a], *COLOURS[b]] for a in COLOURS for b in COLOURS], np.float16)
    return with_column(write_packed(folder), "colours", values)


def test_a_teacher_is_learned_from_alone_first_and_then_beside_the_captions(tmp_path: Path) -> None:
    shards = taught(tmp_path / "set")
    config = tiny(batch=16, steps=60, warmup=5, evaluate_every=60, teacher="colours", teacher_steps=40)
    fit(run(shards, tmp_path / "out", config), silent)
    lines = [line for line in metrics(tmp_path / "out") if "teacher" in line]
    assert lines[-1]["teacher"] < 0.2 and lines[-1]["teacher"] < lines[0]["teacher"] / 2  # 1 says nothing
    assert [line["step"] for line in lines if "contrast" in line] == [50, 60]
    rates = {line["step"]: line["rate"] for line in lines}  # of the step before; the cosine begins with the captions
    assert rates[10] == rates[40] == 1 and rates[50] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 20)))


def test_a_set_without_lessons_is_trained_on_beside_one_with(shards: Path, tmp_path: Path) -> None:
    config = tiny(batch=12, steps=10, evaluate_every=10, teacher="colours", teacher_steps=5)
    two = Run((shards, taught(tmp_path / "set")), tmp_path / "out", config, 1, False, None)
    assert fit(two, silent)
    last = [line for line in metrics(tmp_path / "out") if "teacher" in line][-1]
    assert 0 < last["teacher"] < 2 and last["contrast"] > 0


def test_before_its_first_text_a_run_resumes_exactly_too(tmp_path: Path) -> None:
    shards = taught(tmp_path / "set")
    config = tiny(teacher="colours", teacher_steps=4)
    fit(run(shards, tmp_path / "whole", config), silent)
    fit(run(shards, tmp_path / "parts", config, minutes=0.0), silent)
    first, drawn = (checkpoint.load(tmp_path / "parts" / STATE)[0], drawn_kernel(tmp_path / "fresh"))
    assert torch.equal(first["model.transformer.resblocks.0.mlp.c_fc.weight"], drawn)
    for _ in range(7):
        fit(run(shards, tmp_path / "parts", config, minutes=0.0, resume=True), silent)
    whole, parts = (checkpoint.load(tmp_path / name / STATE)[0] for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["model.transformer.resblocks.0.mlp.c_fc.weight"], drawn)


def test_words_come_last_and_begin_anew_where_they_were_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(readout_steps=12, readout=["add"])
    assert fit(run(shards, tmp_path / "whole", config), silent)
    for number in range(8):
        assert not fit(run(shards, tmp_path / "parts", config, minutes=0.0, resume=number > 0), silent)
    plain = checkpoint.load(tmp_path / "parts" / STATE)
    assert plain[1]["step"] == 8
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("trainer.teach_words.teach", interrupted)
        fit(run(shards, tmp_path / "parts", config, resume=True), silent)
    stopped = checkpoint.load(tmp_path / "parts" / STATE)
    assert stopped[1] == plain[1] and all(torch.equal(value, stopped[0][name]) for name, value in plain[0].items())
    assert [line["step"] for line in metrics(tmp_path / "parts") if "readout" in line] == [18]
    for _ in range(2):  # the second time nothing is left to do
        assert fit(run(shards, tmp_path / "parts", config, resume=True), silent)
    whole, parts = (checkpoint.load(tmp_path / name / STATE) for name in ("whole", "parts"))
    assert whole[1]["step"] == parts[1]["step"] == 20
    assert metrics(tmp_path / "whole")[-3:] == metrics(tmp_path / "parts")[-3:]
    assert all(torch.equal(value, parts[0][name]) for name, value in whole[0].items())
    result = {name: value for name, value in whole[0].items() if name.startswith("average.")}
    changed = {name for name, value in result.items() if not torch.equal(value, plain[0][name])}
    last = {f"average.visual.attnpool.c_proj.{part}" for part in ("weight", "bias")}  # which the balance changes
    assert {name for name in changed if "visual" in name} == last
    half = load_file(tmp_path / "whole" / WEIGHTS)
    assert torch.equal(half["token_embedding.weight"], whole[0]["average.token_embedding.weight"].half())
    assert "Step 20 of 20" in (tmp_path / "whole" / "README.md").read_text()


def interrupted(*asked: object) -> Iterator[float]:
    """The text tower's teaching, with a request to end after ten steps."""
    for number, loss in enumerate(teach(*asked)):  # type: ignore[arg-type]
        if number == 10:
            os.kill(os.getpid(), signal.SIGINT)
        yield loss


def test_a_readout_of_another_number_of_sets_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="`readout` is of 2 sets, but 1 are given"):
        fit(run(shards, tmp_path / "out", tiny(readout_steps=3, readout=["keep", "add"])), silent)


def drawn_kernel(out: Path) -> Tensor:
    """A kernel of the text tower as the seed draws it."""
    from trainer.clip_build import build

    model = build(tiny(), 1, None, out, torch.device("cpu")).model
    weight: Tensor = model.transformer.resblocks[0].mlp.c_fc.weight
    return weight


def test_a_run_may_start_from_another_clip(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "first", tiny(steps=3)), silent)
    given = load_file(tmp_path / "first" / WEIGHTS)
    config = tiny(steps=3, learning_rate=1e-12, matrix_rate=1e-12, ema=0.0)
    again = run(shards, tmp_path / "second", config, start_from=str(tmp_path / "first"))
    fit(again, silent)
    written = load_file(tmp_path / "second" / WEIGHTS)
    fit(run(shards, tmp_path / "parts", config, start_from=str(tmp_path / "first"), minutes=0.0), silent)
    fit(run(shards, tmp_path / "parts", config, start_from=str(tmp_path / "first"), resume=True), silent)
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "parts" / WEIGHTS).read_bytes()
    name = "token_embedding.weight"
    torch.testing.assert_close(written[name], given[name])
    assert f"--start-from {tmp_path / 'first'}" in (tmp_path / "second" / "README.md").read_text()
    with pytest.raises(HeadraceError, match="first weights"):
        fit(run(shards, tmp_path / "second", config, resume=True), silent)
    wide = config.model_copy(update={"model_cfg": {**config.model_cfg, "embed_dim": 32}})
    with pytest.raises(HeadraceError, match="do not fit the config's model") as caught:
        fit(run(shards, tmp_path / "third", wide, start_from=str(tmp_path / "first")), silent)
    assert caught.value.code == 4 and not list((tmp_path / "third").iterdir())
    changes: list[dict[str, object]] = [
        {"model_cfg": {**config.model_cfg, "quick_gelu": True}},
        {"preprocess_cfg": config.preprocess_cfg.model_copy(update={"mean": (0.1, 0.5, 0.9)})},
        {"preprocess_cfg": config.preprocess_cfg.model_copy(update={"resize_mode": "shortest"})},
    ]
    for change in changes:
        with pytest.raises(HeadraceError, match="gives other vectors") as caught:
            other = config.model_copy(update=change)
            fit(run(shards, tmp_path / "third", other, start_from=str(tmp_path / "first")), silent)
        assert caught.value.code == 4 and not list((tmp_path / "third").iterdir())


def test_texts_without_padding_equal_texts_with_it(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "out", tiny(steps=1)), silent)
    clip = load(str(tmp_path / "out"), device="cpu")
    tokens = clip.tokens(["", "a red circle", "word " * 40, "blue", "left and right and left"])
    with torch.inference_mode():
        torch.testing.assert_close(encode_texts(clip.model, tokens), clip.model.encode_text(tokens, normalize=True))


def test_captions_that_are_read_in_part_are_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    captions = [f"{number} " + "word " * (30 if number < 3 else 5) for number in range(16)]
    fit(run(write_packed(tmp_path / "set", captions), tmp_path / "out", tiny(steps=1)), lines.append)
    assert "0-set: of 16 captions 3 are longer than 16 tokens; only their beginning is read" in lines


def test_the_card_says_what_was_trained_on_how_and_what_it_does_not_know(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "out", tiny(steps=1)), silent)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (f"trainer clip --shards {shards} ", "--seed 1", "| 16 | 16 |", "## Limits", '"batch": 6'):
        assert said in card, said


def test_threshold_loss_has_its_boundary_at_the_threshold() -> None:
    def one_pair(cosine: float) -> float:
        image = torch.tensor([[1.0, 0.0]])
        text = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
        return float(threshold_loss(image, text, torch.tensor(20.0)))

    assert one_pair(0.28) == pytest.approx(math.log(2), abs=1e-5)
    assert one_pair(0.5) < 0.02 and one_pair(0.0) > 5


def test_centre_loss_is_zero_only_where_unrelated_pairs_centre_on_zero() -> None:
    assert float(centre_loss(torch.eye(4), torch.eye(4))) == 0
    same: Tensor = torch.ones(4, 1)
    assert float(centre_loss(same, same)) == pytest.approx(2.0)


def test_what_cannot_be_trained_on_is_one_sentence(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="only 1 distinct caption"):
        fit(run(write_packed(tmp_path / "one", rows=1), tmp_path / "a"), silent)
    with pytest.raises(HeadraceError, match="has a caption"):
        fit(run(write_packed(tmp_path / "mute", captions=[None] * 16), tmp_path / "b"), silent)
    with pytest.raises(HeadraceError, match="among 2 sets"):
        fit(run(shards, tmp_path / "c", tiny(shares=(0.5, 0.5))), silent)
    broken = tiny().model_copy(update={"model_cfg": {**tiny().model_cfg, "text_cfg": {"frobnicate": 1}}})
    with pytest.raises(HeadraceError, match="cannot build the model"):
        fit(run(shards, tmp_path / "d", broken), silent)
    assert not list((tmp_path / "d").iterdir())


def test_runs_are_not_mixed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(HeadraceError, match="nothing to resume"):
        fit(run(shards, out, resume=True), silent)
    fit(run(shards, out, tiny(steps=1)), silent)
    with pytest.raises(HeadraceError, match="already holds a run"):
        fit(run(shards, out, tiny(steps=1)), silent)
    with pytest.raises(HeadraceError, match="another config") as caught:
        fit(run(shards, out, tiny(steps=2), resume=True), silent)
    assert caught.value.code == 4
    (out / STATE).write_bytes(b"garbage")
    with pytest.raises(HeadraceError, match="no training state"):
        fit(run(shards, out, tiny(steps=1), resume=True), silent)
    (out / STATE).unlink()
    with pytest.raises(HeadraceError, match="already holds a CLIP"):
        fit(run(shards, out, tiny(steps=1)), silent)


def test_a_full_disk_keeps_the_last_good_checkpoint(shards: Path, tmp_path: Path) -> None:
    fit(run(shards, tmp_path / "out", minutes=0.0), silent)
    before = (tmp_path / "out" / STATE).read_bytes()
    weights = (tmp_path / "out" / WEIGHTS).stat().st_size
    for room in (weights // 2, weights + 1000):  # too little for the weights, then for the state alone
        with small_files(room), pytest.raises(HeadraceError, match=r"cannot write .*file too large"):
            fit(run(shards, tmp_path / "out", resume=True), silent)
        assert (tmp_path / "out" / STATE).read_bytes() == before
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_shipped_configs_are_valid_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    for shipped in CLIP_DEFAULT.parent.glob("clip*.json"):
        assert read_clip_config(shipped).training.batch > 1
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**TINY, "training": {"bacth": 3}}))
    with pytest.raises(HeadraceError, match="did you mean `batch`"):
        read_clip_config(path)
    path.write_text(json.dumps({**TINY, "preprocess_cfg": {**TINY["preprocess_cfg"], "resize_mode": "sqaush"}}))
    with pytest.raises(HeadraceError, match=r"preprocess_cfg\.resize_mode"):
        read_clip_config(path)
    path.write_text("{")
    with pytest.raises(HeadraceError, match="not valid JSON"):
        read_clip_config(path)
    for wrong, said in (
        ({"teacher_steps": 3}, "need a `teacher`"),
        ({"teacher": "x", "teacher_steps": 8}, "below `steps`"),
        ({"readout_steps": 3, "readout": ["keep"]}, "names a set to `add`"),
        ({"readout": ["add"]}, "needs `readout_steps`"),
    ):
        path.write_text(json.dumps({**TINY, "training": {**TINY["training"], **wrong}}))  # type: ignore[dict-item]
        with pytest.raises(HeadraceError, match=said):
            read_clip_config(path)
    path.unlink()
    with pytest.raises(HeadraceError, match="no config"):
        read_clip_config(path)
