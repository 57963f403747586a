"""Words read off picture vectors as text vectors, and a text tower that learns to give them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from pipeline.clip import Clip, load
from tests.trainer.packed import write_packed
from trainer.augment import swapped_captions
from trainer.config import ClipTraining
from trainer.lexicon import Labels, Lexicon
from trainer.readout import RIDGE, Readout, _texts, mixture, of_tokens, phrase, share_held, teach
from trainer.sources import Source, decoded, open_sources

START, END = 90, 91
SWAPPED = [["red and nothing else"]] * 16


def tokens(*texts: list[int]) -> Tensor:
    """Rows of eight: start mark, tokens, end mark, padding."""
    rows = [[START, *text, END] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def pictures(told: list[list[int]], seed: int = 0) -> Tensor:
    """Unit vectors (N, 12): what all share, a direction for every token that is told, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shared, directions = torch.randn(12, generator=generator), torch.randn(100, 12, generator=generator)
    rows = [2 * shared + directions[text].sum(dim=0) + 0.1 * torch.randn(12, generator=generator) for text in told]
    return F.normalize(torch.stack(rows), dim=1)


def spelt(told: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, text)) for text in told]


def sorts(texts: Sequence[str]) -> list[Labels]:
    """The words of texts that are numbers."""
    return [of_tokens(tokens(*([int(word) for word in text.split()] for text in texts)))]


def some_texts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.choice(np.arange(10, 16), size=rng.integers(1, 4), replace=False).tolist() for _ in range(count)]


def test_a_picture_is_nearest_to_the_words_that_are_told_of_it() -> None:
    told = some_texts(300)
    images = pictures(told)
    read = Readout(images[:200], spelt(told[:200]), sorts)
    scores = images[200:] @ read(spelt([[word] for word in range(10, 16)])).T
    there = torch.tensor([[word in text for word in range(10, 16)] for text in told[200:]])
    assert scores[there].quantile(0.01) > scores[~there].quantile(0.99)


def test_the_regression_is_that_of_the_normal_equations() -> None:
    told = some_texts(50)
    images = pictures(told)
    read = Readout(images, spelt(told), sorts)
    x = images.numpy().astype(np.float64)
    known = sorted(word for word in range(10, 16) if sum(word in text for text in told) >= 2)
    seen = np.array([[word in text for word in known] for text in told], np.float64)
    y = seen * np.sqrt(len(told) / seen.sum(axis=0))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    mean = x.mean(axis=0)
    z = x - mean
    ridge = RIDGE * np.linalg.eigvalsh(z.T @ z).mean()
    solved = np.linalg.inv(z.T @ z + ridge * np.eye(12)) @ z.T @ (y - y.mean(axis=0))
    solved -= np.outer(mean, mean @ solved) / (mean @ mean)
    wanted = y @ solved.T
    wanted /= np.quantile(np.linalg.norm(wanted, axis=1), 0.5, method="lower")  # torch's median
    np.testing.assert_allclose(read(spelt(told)).numpy(), wanted, atol=1e-4)


def test_what_all_pictures_share_says_nothing_and_order_and_unknown_words_neither() -> None:
    told = some_texts(60)
    images = pictures(told)
    read = Readout(images, spelt([*told[:59], [70]]), sorts)
    found = read(spelt([[10, 11], [11, 10], [10, 11, 11, 50], [70], []]))
    assert float((found @ images.mean(dim=0)).abs().max()) < 1e-5
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert not found[3:].any() and found[0].norm() > 0.1


@pytest.mark.parametrize("texts", [[[word] for word in range(10, 30)], [[10, word] for word in range(11, 31)]])
def test_words_that_tell_no_pictures_apart_are_one_sentence(texts: list[list[int]]) -> None:
    with pytest.raises(HeadraceError, match="no words of the sets to `add` tell their pictures apart"):
        Readout(pictures(texts), spelt(texts), sorts)


def test_captions_without_a_known_word_leave_the_scale_to_the_others() -> None:
    told = some_texts(40) + [[word] for word in range(20, 80)]
    read = Readout(pictures(told), spelt(told), sorts)
    assert read(spelt(told[:40])).norm(dim=1).median() == pytest.approx(1, abs=1e-5)


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


def test_of_a_word_that_no_caption_has_is_told_what_is_told_of_its_kind() -> None:
    told = some_texts(300)
    images = pictures(told)
    letters = str.maketrans("0123456789", "abcdefghij")
    lexicon = Lexicon({str(n).translate(letters): {"even" if n % 2 == 0 else "odd": 1.0} for n in range(10, 40)})
    read = Readout(
        images, spelt(told), lambda texts: [*sorts(texts), lexicon.labels([text.translate(letters) for text in texts])]
    )
    even, odd, unknown = read(["30", "31", "50"])
    shares = torch.tensor([sum(word % 2 == 0 for word in text) / len(text) for text in told])
    assert (images @ even)[shares == 1].quantile(0.1) > (images @ even)[shares == 0].quantile(0.9)
    assert float(F.cosine_similarity(even, odd, dim=0)) < 0 and not unknown.any()


def test_a_kind_that_all_pictures_have_says_nothing() -> None:
    told = [[10], [11]] * 30
    lexicon = Lexicon({word: {"product": 1.0, word: 1.0} for word in ("red", "blue", "owl")})
    named = ["red" if 10 in text else "blue" for text in told]
    read = Readout(pictures(told), named, lambda texts: [lexicon.labels(texts)])
    found = read(["owl", "red", "an owl, red"])
    assert not found[0].any() and found[1].norm() > 0.1 and found[2].norm() > 0.1


def test_a_lexicon_of_other_words_is_one_sentence() -> None:
    told = some_texts(60)
    lexicon = Lexicon({"hibou": {"oiseau": 1.0}})
    with pytest.raises(HeadraceError, match="in no two captions"):
        Readout(pictures(told), spelt(told), lambda texts: [*sorts(texts), lexicon.labels(texts)])


def test_phrases_are_of_one_or_two_words_of_the_lexicon() -> None:
    lexicon = Lexicon({"owl": {"bird": 1.0}, "polar bear": {"bear": 1.0}})
    rng = np.random.default_rng(0)
    found = {phrase(lexicon, rng) for _ in range(300)}
    alone = {"owl", "an owl", "An owl.", "polar bear", "a polar bear", "A polar bear."}
    assert found == alone | {f"{word}, {text}" for word in ("owl", "polar bear") for text in alone}


def test_what_a_tower_said_counts_as_far_as_captions_hold_the_words() -> None:
    assert share_held("A polar bear.", {"a", "bear"}) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> list[Source]:
    kept = write_packed(tmp_path_factory.mktemp("kept") / "set", [f"{n} toys on a shelf" for n in range(16)], SWAPPED)
    added = write_packed(tmp_path_factory.mktemp("added") / "set")
    opened = open_sources([kept, added], ClipTraining(batch=16), seed=0)
    return [decoded(one, clip, print) for one in opened]


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


def test_what_is_kept_has_wrong_captions_of_its_own_or_exchanged_words(
    sources: list[Source], tmp_path: Path, clip: Clip
) -> None:
    (plain,) = open_sources([write_packed(tmp_path / "set")], ClipTraining(batch=16), seed=0)
    for source, wrong in ((sources[0], set(SWAPPED[0])), (decoded(plain, clip, print), None)):
        texts = _texts(["one", "two"], [source], None, np.random.default_rng(0))
        assert len(texts.added) == 192 and set(" ".join(texts.added).split()) == {"one", "two"}
        assert not texts.phrases
        kept = list(zip(texts.same[::2], texts.same[1::2], strict=True))
        assert len(kept) == 32
        assert all(caption in source.train.captions for caption, _ in kept)
        assert all(other in (wrong or swapped_captions(caption) or [caption]) for caption, other in kept)
        assert sum(other != caption for caption, other in kept) > 16


def test_half_of_what_is_new_are_phrases_where_there_is_a_lexicon(sources: list[Source]) -> None:
    lexicon = Lexicon({"owl": {"bird": 1.0}})
    texts = _texts(["one two", "three"], sources[:1], lexicon, np.random.default_rng(0))
    assert (len(texts.added), len(texts.phrases), len(texts.same)) == (96, 96, 64)
    assert all("owl" in text.lower() for text in texts.phrases)
    captions = sum(text in ("one two", "three") for text in texts.added[64:])
    assert captions == 32 and any(text not in ("one two", "three") for text in texts.added[:64])


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
