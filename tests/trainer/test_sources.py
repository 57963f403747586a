"""The sets that a CLIP is trained on: what a step draws of them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.clip import Clip, load
from tests.trainer.packed import write_packed
from trainer.config import ClipTraining
from trainer.sources import Source, decoded, draw, open_sources

SWAPS = [[f"{number}, toy, right", f"{number}, toy, above"][: number % 3] for number in range(16)]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> list[Source]:
    captions = [f"{number}, toy, left" for number in range(16)]
    told = write_packed(tmp_path_factory.mktemp("told") / "set", captions, SWAPS)
    plain = write_packed(tmp_path_factory.mktemp("plain") / "curated")
    opened = open_sources([told, plain], ClipTraining(batch=16, shares=(3, 1)), seed=5)
    return [decoded(one, clip, print) for one in opened]


def test_sets_share_the_batch_and_are_named_after_their_folders(sources: list[Source]) -> None:
    assert [source.batches.size for source in sources] == [12, 4]
    assert sources[0].name == "0-set" and sources[1].name.startswith("1-plain")
    assert sources[0].facts == {"rows": 16, "distinct captions": 16}
    drawn = draw(sources, 0, 0.0, np.random.default_rng(0))
    assert len(drawn.pictures) == len(drawn.captions) == len(drawn.sided) == 16


def test_wrong_captions_are_the_sets_own_or_exchanged_words(sources: list[Source]) -> None:
    drawn = draw(sources, 0, 0.0, np.random.default_rng(0))
    rows = sources[0].batches.rows(0).tolist()
    own = [(place, text) for place, row in enumerate(rows) for text in SWAPS[row]]
    pairs = list(zip(drawn.owners, drawn.wrong, strict=True))
    assert [pair for pair in pairs if pair[0] < 12] == own
    others = [(place, text) for place, text in pairs if place >= 12]
    told_apart = {
        place for place in range(12, 16) if len({text.split()[0] for text in drawn.captions[place].split(", ")}) == 2
    }
    assert {place for place, _ in others} == told_apart and len(
        told_apart
    ) > 2  # of one colour alone: nothing to exchange
    assert all(text != drawn.captions[place] for place, text in others)


def test_a_side_is_told_by_the_whole_caption(sources: list[Source]) -> None:
    varied = [draw(sources, 0, 1.0, np.random.default_rng(seed)) for seed in range(4)]
    assert all(one.sided.all() for one in varied)
    assert any("left" not in text for one in varied for text in one.captions[:12])


def test_exchanged_words_are_those_of_what_is_said(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> None:
    """What a cut caption leaves unsaid is true: no wrong caption may name it."""
    captions = [f"{number}, toy, left, small, big sign" for number in range(16)]
    folder = write_packed(tmp_path_factory.mktemp("keywords") / "set", captions)
    source = [decoded(one, clip, print) for one in open_sources([folder], ClipTraining(batch=16), seed=5)]
    drawn = draw(source, 0, 1.0, np.random.default_rng(0))
    cut = [(drawn.captions[place], text) for place, text in zip(drawn.owners, drawn.wrong, strict=True)]
    assert cut and any(said.count(",") < 4 for said, _ in cut)
    for said, text in cut:
        new = set(text.replace(",", "").split()) - set(said.replace(",", "").split())
        assert text.count(",") == said.count(",") and new <= {"right"}  # sizes, exchanged, are both there before


def test_no_caption_comes_twice_by_being_cut(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> None:
    captions = [f"toy, red, {number}" for number in range(16)]
    folder = write_packed(tmp_path_factory.mktemp("alike") / "set", captions)
    source = [decoded(one, clip, print) for one in open_sources([folder], ClipTraining(batch=16), seed=5)]
    for seed in range(20):
        drawn = draw(source, 0, 1.0, np.random.default_rng(seed)).captions
        assert len(set(drawn)) == 16 and any(text.count(",") < 2 for text in drawn)


def test_a_draw_is_a_function_of_the_step_and_the_generator(sources: list[Source]) -> None:
    one, same, other = (draw(sources, step, 0.5, np.random.default_rng(9)) for step in (3, 3, 4))
    assert one.captions == same.captions and one.pictures.equal(same.pictures) and one.captions != other.captions
