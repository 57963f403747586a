"""Words read off picture vectors as text vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from trainer.lexicon import Labels, Lexicon
from trainer.readout import RIDGE, SIGHT_FLOOR, SIGHT_OF_MEAN, Readout, of_tokens, sight

START, END = 90, 91


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


def test_what_a_picture_is_taken_for_counts_as_words_of_it_do() -> None:
    """Of pictures with one caption, half are taken for 14, which tells them apart as its own caption would."""
    told = [[10, 11], [10, 12], [14], [15]] * 10 + [[13], [13, 14]] * 20
    images = pictures(told)
    captions = spelt([[word for word in text if word != 14] if 13 in text else text for text in told])
    guesses = [("14",) * 20 if text == [13, 14] else ("15", "70") if text == [13] else () for text in told]
    apart = torch.tensor([text == [13, 14] for text in told]), torch.tensor([text == [13] for text in told])
    plain, guessed = (images @ Readout(images, captions, sorts, guesses=some)(["14"])[0] for some in ((), guesses))
    gaps = [float(scores[apart[0]].mean() - scores[apart[1]].mean()) for scores in (plain, guessed)]
    assert gaps[1] > 1.5 * gaps[0] > 0


def test_guesses_are_the_mean_of_their_words() -> None:
    told = some_texts(50)
    images = pictures(told)
    guesses = [("10", "10", "11 12", "70")] * 10 + [()] * 40
    read = Readout(images, spelt(told), sorts, guesses=guesses)
    x = (images - images.mean(dim=0)).double()
    y = read._words(spelt(told)).double()
    y[:10] += (read._words(["10"]) / 2 + read._words(["11 12"]) / 4).double()
    ridge = RIDGE * torch.linalg.eigvalsh(x.T @ x).mean()
    solved = torch.linalg.solve(x.T @ x + ridge * torch.eye(12), x.T @ y).float()
    mean = images.mean(dim=0)
    solved -= torch.outer(mean, mean @ solved) / (mean @ mean)
    wanted = read._words(spelt(told)) @ solved.T
    torch.testing.assert_close(read(spelt(told)), wanted / wanted.norm(dim=1).median(), atol=1e-4, rtol=1e-4)


def test_sight_is_a_root_of_how_pictures_vary() -> None:
    images = pictures(some_texts(80))
    root = sight(images)
    mean = images.mean(dim=0)
    covariance = torch.cov(images.T, correction=0)
    level = covariance.diagonal().mean()
    more = SIGHT_FLOOR * torch.eye(12) + SIGHT_OF_MEAN * torch.outer(mean, mean) / (mean @ mean)
    torch.testing.assert_close(root @ root, covariance + level * more, atol=1e-6, rtol=1e-4)
