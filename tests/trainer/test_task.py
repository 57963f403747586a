"""How long a model is trained on a set of so many rows."""

from __future__ import annotations

from trainer.task import Training


def test_fewer_steps_leave_a_shorter_warm_up() -> None:
    training = Training(batch=8, steps=1000, warmup=100, epochs=2)
    assert [(on.steps, on.warmup) for on in map(training.on, (16, 400, 1200, 10_000))] == [
        (4, 0),
        (100, 10),
        (300, 30),
        (1000, 100),
    ]
