"""A text tower learns what is read off picture vectors."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip import Clip, load
from tests.trainer.packed import SWAPPED, write_kept, write_packed
from trainer.config import ClipTraining
from trainer.lexicon import Lexicon
from trainer.sources import Source, decoded, open_sources
from trainer.teach_words import PLACED, Read, place_words, share_held, teach


def test_what_a_tower_said_counts_as_far_as_captions_hold_the_words() -> None:
    assert share_held("A polar bear.", {"a", "bear"}) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> list[Source]:
    kept = write_kept(tmp_path_factory.mktemp("kept") / "set")
    added = write_packed(tmp_path_factory.mktemp("added") / "set")
    opened = open_sources([kept, added], ClipTraining(batch=16), seed=0)
    return [decoded(one, clip, print) for one in opened]


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.phrases.TEXTS", 192)


SETTINGS = ClipTraining(readout_steps=40, readout=("keep", "add"))


def test_a_tower_learns_words_and_keeps_what_it_is_to_keep(sources: list[Source]) -> None:
    clip = load("mini", "cpu")
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    captions, others = list(sources[1].train.captions), [*sources[0].train.captions, SWAPPED[0][0]]
    own, same = clip.encode_texts(captions), clip.encode_texts(others)
    losses = list(teach(clip, sources, SETTINGS, None, 0, lambda: False))
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.35 * np.mean(losses[:5])
    after = clip.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and not any(name.startswith("visual.") or name == "logit_scale" for name in moved)
    kept, changed = (
        (a * b).sum(axis=1) for a, b in ((same, clip.encode_texts(others)), (own, clip.encode_texts(captions)))
    )
    assert kept.min() > 0.9 > changed.mean()


def test_a_tower_learns_what_a_word_is_like_that_no_caption_has(sources: list[Source]) -> None:
    """Pictures whose left half is red are told apart by "crimson", which only the lexicon knows, as red."""
    clip = load("mini", "cpu")
    kinds = {
        "red": ("red", "scarlet"),
        "green": ("green", "jade"),
        "blue": ("blue", "azure"),
        "white": ("white", "ivory"),
    }
    lexicon = Lexicon({word: {kind: 1.0, "colour": 1.0} for kind, words in kinds.items() for word in words})
    train = sources[1].train
    pictures = clip.encode_images(sources[1].val_pictures.take(np.arange(16)))
    told = np.array([[kind in text for kind in kinds] for text in train.captions[:16]])

    def apart() -> float:
        scores = pictures @ clip.encode_texts([f"a {strange}" for _, strange in kinds.values()]).T
        return float(scores[told].mean() - scores[~told].mean())

    list(teach(clip, sources, SETTINGS, lexicon, 0, lambda: False))
    with_kinds = apart()
    clip = load("mini", "cpu")
    list(teach(clip, sources, SETTINGS, None, 0, lambda: False))
    assert with_kinds > apart() + 0.05


def test_a_token_that_is_a_word_begins_with_what_is_read_of_it(sources: list[Source]) -> None:
    clip = load("mini", "cpu")
    table = clip.model.token_embedding.weight
    before = table.detach().clone()
    told = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    words = ["owl", "crab", "toys", "hedgehog and owl"]  # "toys" is kept, the last is several tokens
    read = Read(lambda texts: torch.stack([told[words.index(text)] for text in texts]), torch.eye(256))
    place_words(clip, read, words, sources[:1], seed=0)
    moved = (table != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == sorted(clip.tokens(["owl", "crab"])[:, 1].tolist())
    added = (table - before)[clip.tokens(["owl", "crab"])[:, 1]].detach()
    lengths = told[:2].norm(dim=1)
    np.testing.assert_allclose(added.norm(dim=1), PLACED * lengths / lengths.median(), rtol=0.15)
    wanted = torch.nn.functional.cosine_similarity(told[0], told[1], dim=0)
    assert torch.nn.functional.cosine_similarity(added[0], added[1], dim=0) == pytest.approx(float(wanted), abs=0.15)


@pytest.mark.parametrize("words", [["toys"], ["hedgehog and owl"], []])
def test_where_no_token_is_a_word_of_its_own_nothing_is_placed(sources: list[Source], words: list[str]) -> None:
    clip = load("mini", "cpu")
    before = clip.model.token_embedding.weight.detach().clone()
    place_words(clip, Read(lambda texts: torch.zeros(len(texts), 256), torch.eye(256)), words, sources[:1], seed=0)
    place_words(clip, Read(lambda texts: torch.zeros(len(texts), 256), torch.eye(256)), ["owl"], sources[:1], seed=0)
    assert torch.equal(before, clip.model.token_embedding.weight)


def test_rows_without_a_caption_have_no_part(tmp_path: Path) -> None:
    clip = load("mini", "cpu")
    captions = [*(f"a {colour} square" for colour in ("red", "blue", "green") * 5), ""]
    (opened,) = open_sources([write_packed(tmp_path / "set", captions)], ClipTraining(batch=16), seed=0)
    source, seen = decoded(opened, clip, print), []
    tokens_of = clip.tokens
    clip.tokens = lambda texts: seen.append(list(texts)) or tokens_of(texts)  # type: ignore[method-assign,func-returns-value]
    list(teach(clip, [source], ClipTraining(readout_steps=2, readout=("add",)), None, 0, lambda: False))
    assert len(seen[0]) == 15 and all(text.strip() for texts in seen for text in texts)


def test_it_is_the_same_again_and_stops_when_asked(sources: list[Source]) -> None:
    first, again, other = (
        list(islice(teach(load("mini", "cpu"), sources, SETTINGS, None, seed, lambda: False), 3)) for seed in (0, 0, 1)
    )
    assert first == again != other
    asked = iter([False, False, False, True])  # once before the pictures are encoded
    assert len(list(teach(load("mini", "cpu"), sources, SETTINGS, None, 0, lambda: next(asked)))) == 2
