"""Texts that a text tower is taught readouts of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import Clip
from tests.trainer.packed import SWAPPED, write_kept, write_packed
from trainer.augment import swapped_captions
from trainer.config import ClipTraining
from trainer.lexicon import Lexicon
from trainer.phrases import Phrases, draw_texts, mixture
from trainer.sources import Source, decoded, open_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> list[Source]:
    kept = write_kept(tmp_path_factory.mktemp("kept") / "set")
    (opened,) = open_sources([kept], ClipTraining(batch=16), seed=0)
    return [decoded(opened, clip, print)]


def test_mixtures_are_of_the_captions_words() -> None:
    captions = ["one, two, three", "four five", "six"]
    rng = np.random.default_rng(0)
    found = [mixture(captions, rng) for _ in range(300)]
    words = {word for text in captions for word in text.replace(",", "").split()}
    assert all(text.split() and set(text.split()) <= words for text in found)
    assert {"six", "one three"} <= set(found)
    assert any("six" in text and "four" in text for text in found)
    assert any(text.find("two") < text.find("one") and "two" in text for text in found)
    assert max(len(text.split()) for text in found) <= 12
    assert max(len(mixture([" ".join("abcdefghijklmnopqrstu")], rng).split()) for _ in range(20)) == 12


def test_phrases_begin_with_a_word_of_the_lexicon_and_go_on_with_its_and_the_captions() -> None:
    phrases = Phrases(Lexicon({"owl": {"bird": 1.0}, "polar bear": {"bear": 1.0}}), ["red, green", "blue"])
    rng = np.random.default_rng(0)
    found = [phrases(rng) for _ in range(3000)]
    bare = [text.removeprefix("a ").removeprefix("an ").removeprefix("the ") for text in found]
    assert all(text.startswith(("owl", "polar bear")) for text in bare)
    alone = np.mean([text in ("owl", "polar bear") for text in bare])
    assert 0.26 < alone < 0.34
    mixed = [text for text in bare if text not in ("owl", "polar bear")]
    spoken = np.mean([any(word in text for word in ("red", "green", "blue")) for text in mixed])
    assert 0.4 < spoken < 0.65 and max(len(text.split()) for text in bare) > 6
    assert {"owl with red", "polar bear, owl", "owl blue"} <= set(bare)


def test_what_is_kept_has_wrong_captions_of_its_own_or_exchanged_words(
    sources: list[Source], tmp_path: Path, clip: Clip
) -> None:
    (plain,) = open_sources([write_packed(tmp_path / "set")], ClipTraining(batch=16), seed=0)
    for source, wrong in ((sources[0], set(SWAPPED[0])), (decoded(plain, clip, print), None)):
        texts = draw_texts(["one", "two"], [source], None, np.random.default_rng(0))
        assert len(texts.added) == 336 and set(" ".join(texts.added).split()) == {"one", "two"}
        assert not texts.phrases
        kept = list(zip(texts.same[::2], texts.same[1::2], strict=True))
        assert len(kept) == 24
        assert all(caption in source.train.captions for caption, _ in kept)
        assert all(other in (wrong or swapped_captions(caption) or [caption]) for caption, other in kept)
        assert sum(other != caption for caption, other in kept) > 12


def test_three_quarters_of_what_is_new_are_phrases_where_there_is_a_lexicon(sources: list[Source]) -> None:
    lexicon = Lexicon({"owl": {"bird": 1.0}})
    captions = ["one two", "three"]
    texts = draw_texts(captions, sources[:1], Phrases(lexicon, captions), np.random.default_rng(0))
    assert (len(texts.added), len(texts.phrases), len(texts.same)) == (84, 252, 48)
    assert all("owl" in text for text in texts.phrases)
    assert sum(text in captions for text in texts.added[56:]) == 28
    assert any(text not in captions for text in texts.added[:56])
