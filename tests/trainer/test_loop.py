"""The training loop: exact resume, sharing a step among parts, averages, interruption."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.base import HeadraceError
from tests.trainer.toy import CPU, SETTINGS, Losses, Toy, assert_equal_states, figures, plan, state, train, trained_rows
from trainer.average import average_decay, update_average
from trainer.log import METRICS
from trainer.loop import Loop, by_level
from trainer.optim import MuonAdamW
from trainer.task import Tensors


def test_how_long_a_step_waited_for_its_batch_is_told(tmp_path: Path) -> None:
    class Slow(Toy):
        def read(self, rows: Any) -> Tensors:
            time.sleep(0.2)
            return super().read(rows)

    told = []
    for name, task in (("slow", Slow()), ("quick", Toy())):
        train(tmp_path / name, task)
        lines = [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()]
        told.append([line["waiting"] for line in lines if "waiting" in line])
    assert len(told[0]) == len(told[1]) == 2  # at step 10 and at the last
    assert min(told[0]) > 0.5 > max(told[1]) >= 0 and max(told[0]) <= 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopping_often_ends_where_not_stopping_does(tmp_path: Path, optimizer: str) -> None:
    training = SETTINGS.model_copy(update={"optimizer": optimizer})
    whole, _ = train(tmp_path / "whole", training=training)
    for number in range(12):
        train(tmp_path / "parts", training=training, deadline=0.0, resume=number > 0)  # one step, then stopped
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert len(trained_rows(whole)) == 12 and len({tuple(rows) for rows in trained_rows(whole)}) == 12


def test_a_kill_in_mid_accumulation_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    task = Toy()
    loop = Loop(task, plan(tmp_path / "killed"), CPU, lambda line: None)
    task.dies_at = 1 + 5 * 4 + 2 * 5 * 3 + 2 * 4 + 2  # counting, five steps, held-out losses, and into the eighth step
    with pytest.raises(RuntimeError, match="killed"):
        loop.run()
    assert 5 < loop.step < 12 and state(tmp_path / "killed")[1] == 5
    again, _ = train(tmp_path / "killed", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "killed")
    assert figures(tmp_path / "whole") == figures(tmp_path / "killed")
    assert trained_rows(again) == trained_rows(train(tmp_path / "third")[0])[5:]


def test_gradients_are_clipped_to_the_norm_and_the_norm_of_before_is_told(tmp_path: Path) -> None:
    training = SETTINGS.model_copy(update={"clip_norm": 1e-3})
    loop = Loop(Toy(), plan(tmp_path, training=training), CPU, lambda line: None)
    norms: list[float] = []

    def look(*_: object) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None]).norm()))

    loop.optimizer.register_step_pre_hook(look)
    with loop._prepared():
        told = loop.train_step(loop.task.read(loop._rows(0)))
    assert norms == [pytest.approx(1e-3, rel=1e-3)] and float(told["norm"]) > 0.01


def test_a_part_at_a_time_adds_up_to_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for part in (8, 2, 1):
        training = SETTINGS.model_copy(update={"part": part, "clip_norm": 1e9})
        loop = Loop(Toy(dropout=0.0), plan(tmp_path, training=training), CPU, lambda line: None)
        with loop._prepared():
            loop.train_step(loop.task.read(loop._rows(0)))
        found.append([p.grad for p in loop.model.parameters()])
    for parts in found[1:]:
        for whole, added in zip(found[0], parts, strict=True):
            assert whole is not None and whole.any()
            torch.testing.assert_close(added, whole, atol=1e-7, rtol=1e-5)


def test_another_seed_reads_other_rows(tmp_path: Path) -> None:
    one, other = train(tmp_path / "one")[0], train(tmp_path / "other", seed=8)[0]
    assert trained_rows(one) != trained_rows(other)


def test_one_part_and_four_learn_the_same(tmp_path: Path) -> None:
    for name, part in (("one", 8), ("four", 2)):
        training = SETTINGS.model_copy(update={"part": part})
        train(tmp_path / name, Toy(dropout=0.0), training=training)
    (one, _), (four, _) = state(tmp_path / "one"), state(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=2e-3, rtol=2e-3)  # Muon's iteration is in bfloat16


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(2, 2)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        model.weight += 1
    average = {name: value.clone() for name, value in start.items()}
    update_average(average, model, 1.0)
    assert all(torch.equal(average[name], start[name]) for name in start)
    update_average(average, model, 0.75)
    torch.testing.assert_close(average["weight"], start["weight"] + 0.25)
    update_average(average, model, 0.0)
    assert torch.equal(average["weight"], model.weight)
    assert average_decay(0.999, 0) == 0.1 and average_decay(0.999, 90) == 0.91 and average_decay(0.5, 90) == 0.5


def test_raw_and_averaged_weights_are_both_reported_and_the_average_saved(tmp_path: Path) -> None:
    task, loop = train(tmp_path / "a")
    last = [line for line in figures(tmp_path / "a") if "figure" in line][-1]
    assert last["held_out/raw_loss_t50"] != last["held_out/loss_t50"]
    assert all(torch.equal(task.saved[name], value) for name, value in loop.average.items())
    assert not any(torch.equal(task.saved[name], value) for name, value in loop.model.named_parameters())


def test_losses_are_told_apart_by_noise_level() -> None:
    means = by_level(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 250, 499, 999]))
    assert {name: float(value) for name, value in means.items()} == {
        "loss": 2.75,
        "loss_q0": 1.0,
        "loss_q1": 2.5,
        "loss_q3": 5.0,
    }


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    class Interrupted(Toy):
        def losses(self, predict: Losses, batch: Tensors, draw: Tensors) -> Tensor:
            if self.calls == 1 + 3 * 4 + 1:  # in the middle of the fourth step
                os.kill(os.getpid(), signal.SIGINT)
            return super().losses(predict, batch, draw)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", Interrupted())
    assert state(tmp_path / "a")[1] == 4 and signal.getsignal(signal.SIGINT) is before
    train(tmp_path / "a", resume=True)
    train(tmp_path / "whole")
    assert_equal_states(tmp_path / "whole", tmp_path / "a")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    class Broken(Toy):
        def losses(self, predict: Losses, batch: Tensors, draw: Tensors) -> Tensor:
            return super().losses(predict, batch, draw) * (float("nan") if self.calls > 60 else 1)

    with pytest.raises(HeadraceError, match="not finite"):
        train(tmp_path / "a", Broken())
    tensors, step = state(tmp_path / "a")
    assert step == 5 and all(bool(value.isfinite().all()) for value in tensors.values())


def test_rows_that_cannot_be_read_end_the_run_and_keep_what_was_learned(tmp_path: Path) -> None:
    class Torn(Toy):
        def read(self, rows: Any) -> Tensors:
            if len(self.seen) > 9:
                raise HeadraceError("a tar cannot be read")
            return super().read(rows)

    with pytest.raises(HeadraceError, match="cannot be read"):
        train(tmp_path / "a", Torn())
    kept = state(tmp_path / "a")[1]
    assert kept > 5
    train(tmp_path / "a", resume=True)
    train(tmp_path / "whole")
    assert_equal_states(tmp_path / "whole", tmp_path / "a")


def test_batches_that_are_read_ahead_are_the_same_and_so_after_a_stop(tmp_path: Path) -> None:
    """As on a GPU, where a stopped run has read more than it learned from."""
    train(tmp_path / "whole")
    for calls in range(3):
        deadline = None if calls == 2 else 0.0
        loop = Loop(Toy(), plan(tmp_path / "ahead", resume=calls > 0, deadline=deadline), CPU, lambda line: None)
        loop.ahead = 2
        assert loop.run() == (deadline is None)
    assert_equal_states(tmp_path / "whole", tmp_path / "ahead")


def test_a_long_wait_for_the_next_figures_leaves_states_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, step in ((0.0, 6), (600.0, 5)):  # figures come after 5
        monkeypatch.setattr("trainer.loop.SAVE_EVERY", seconds)
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / str(seconds), Toy(dies_at=1 + 6 * 4 + 2 * 5 * 3 + 1))
        assert state(tmp_path / str(seconds))[1] == step


def test_a_resumed_run_loses_no_point_of_its_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, Toy(dies_at=1 + 5 * 4 + 2 * 5 * 3 + 1))  # just after the figures of step 5
    train(tmp_path, resume=True)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("figure")] == [5, 10, 12]


def test_a_line_of_metrics_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "a", deadline=0.0)
    with (tmp_path / "a" / METRICS).open("a") as file:
        file.write('{"step": 1, "lo')
    train(tmp_path / "a", resume=True)
    assert figures(tmp_path / "whole") == figures(tmp_path / "a")


def test_a_state_of_another_config_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "a")
    with pytest.raises(HeadraceError, match="another config") as caught:
        train(tmp_path / "a", resume=True, digest="other")
    assert caught.value.code == 4


def test_a_state_of_a_model_of_another_version_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "a", deadline=0.0)
    task = Toy()
    task.model = nn.Sequential(task.model, nn.Identity())  # its weights have other names
    with pytest.raises(HeadraceError, match=r"state\.safetensors is of another version of the toy") as caught:
        train(tmp_path / "a", task, resume=True)
    assert caught.value.code == 4


def test_a_batch_that_cannot_be_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="batch of 8 cannot be shared"):
        train(tmp_path / "a", training=SETTINGS.model_copy(update={"part": 3}))


def test_the_peak_rates_are_reached_and_end_at_zero(tmp_path: Path) -> None:
    loop = Loop(Toy(), plan(tmp_path), CPU, print)
    rates = []
    for loop.step in range(13):
        rates.append(loop.rate())
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] == 1 and rates[12] == pytest.approx(0)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert isinstance(loop.optimizer, MuonAdamW)


def test_the_config_says_how_the_rates_fall(tmp_path: Path) -> None:
    shares = []
    for decay in ("cosine", "linear"):
        loop = Loop(Toy(), plan(tmp_path, training=SETTINGS.model_copy(update={"decay": decay})), CPU, print)
        loop.step = 6  # a third of the way from the end of the warm-up to the end
        shares.append(loop.rate())
    assert shares == pytest.approx([0.75, 2 / 3])


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_keeps_its_names(tmp_path: Path) -> None:
    train(tmp_path / "plain", Toy(dropout=0.0))
    train(tmp_path / "fast", Toy(dropout=0.0), training=SETTINGS.model_copy(update={"compile": True}))
    (plain, _), (fast, _) = state(tmp_path / "plain"), state(tmp_path / "fast")
    assert set(plain) == set(fast) and not any("_orig_mod" in name for name in fast)
    for name in plain:
        torch.testing.assert_close(plain[name], fast[name], atol=5e-3, rtol=5e-3)
