"""Text vectors that say what is read off a CLIP's picture vectors.

Words read off picture vectors by ridge regression know less of captions than a text tower, and more of words. Such a
readout is linear in a picture's vector v: with y the words of a text, and what a lexicon says they are kinds of, its
score is v · B y, so B y is a text vector of the same space (`trainer.teach_words` has a tower learn it). What another
network takes a picture for counts as its words do. It knows nothing of files, models or sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from trainer.lexicon import Labels
from trainer.ridge import power, ridge_of
from trainer.word_loss import inside

RIDGE, RIDGE_OF_KINDS = 0.5, 0.03  # of the mean eigenvalue, without and with a lexicon
SEEN = 2  # captions that must hold a token, or a kind
SHORTEST = 1e-4  # of a text's vector before they are scaled: what is shorter is rounding
ROWS = 4096  # rows of words made at once
SIGHT_FLOOR, SIGHT_OF_MEAN = 0.1, 10.0  # of the mean eigenvalue: the least that a direction counts, and what all share


class Known:
    """The names that at least SEEN texts have, each weighted by the root of how seldom it is."""

    def __init__(self, labels: Labels) -> None:
        counts = torch.bincount(labels.names)
        self._place = torch.where(counts >= SEEN, (counts >= SEEN).cumsum(0) - 1, -1)
        self._weight = (labels.texts / counts[counts >= SEEN]).sqrt()
        self.size = len(self._weight)

    def __call__(self, labels: Labels) -> Tensor:
        """Rows of length 1 (count, known), or of zeros where nothing is known."""
        there = labels.names < len(self._place)
        rows, place, values = labels.rows[there], self._place[labels.names[there]], labels.values[there]
        known = place >= 0
        out = torch.zeros(labels.texts, self.size, device=self._weight.device)
        out[rows[known], place[known]] = values[known]
        return F.normalize(out * self._weight, dim=1)


class Readout:
    """Text vectors of words, from picture vectors (N, D), their captions, and what a text has: `labels` of each sort.

    Every sort counts the same: the words themselves, and the kinds of things that a lexicon says they mean. `share` of
    the mean eigenvalue is the ridge. Where there are `guesses`, any number of texts for each picture, their mean
    counts as much as its caption.

    Raises:
        HeadraceError: no word comes twice, or those that do tell no picture from another; no kind of a lexicon does.
    """

    def __init__(
        self,
        images: Tensor,
        captions: Sequence[str],
        labels: Callable[[Sequence[str]], Sequence[Labels]],
        share: float = RIDGE,
        guesses: Sequence[Sequence[str]] = (),
    ) -> None:
        self._labels = labels
        self._known = [Known(sort) for sort in labels(captions)]
        self._shortest = 0.0
        if not all(known.size for known in self._known[1:]):
            hint = "give a lexicon of the captions' language, or leave --lexicon out"
            raise HeadraceError("what the lexicon's words are kinds of is in no two captions", hint=hint)
        mean = images.mean(dim=0)
        x = (images - mean).double()
        product = self._product(x, captions)
        if any(guesses):
            product = product + self._product(*_by_guess(x, guesses))
        told = ridge_of(x.T @ x, product, share).float()
        # What all pictures share must count for nothing: a text's score would depend on it.
        self._directions = told - torch.outer(mean, mean @ told) / (mean @ mean)
        parts = (captions[start : start + ROWS] for start in range(0, len(captions), ROWS))
        lengths = torch.cat([self(texts).norm(dim=1) for texts in parts])
        if not (lengths > SHORTEST).any():
            hint = "name a set with more words in `training.readout`, or leave `readout_steps` out"
            raise HeadraceError("no words of the sets to `add` tell their pictures apart", hint=hint)
        median = lengths[lengths > SHORTEST].median()
        self._directions /= median
        self._shortest = SHORTEST / float(median)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B y (M, D) of texts: 0 where nothing is known that tells pictures apart; of captions a median length of 1."""
        told = self._words(texts) @ self._directions.T
        return torch.where(told.norm(dim=1, keepdim=True) > self._shortest, told, 0)

    def _product(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """XᵀY (D, known) of x (N, D) and the words of N texts."""
        product = torch.zeros((), dtype=x.dtype)
        for start, part in zip(range(0, len(texts), ROWS), torch.split(x, ROWS), strict=True):
            product = product + part.T @ self._words(texts[start : start + ROWS]).double()
        return product

    def _words(self, texts: Sequence[str]) -> Tensor:
        """y (M, known): what is known of each text, of length 1."""
        sorts = [known(one) for known, one in zip(self._known, self._labels(texts), strict=True)]
        return F.normalize(torch.cat(sorts, dim=1), dim=1)


def _by_guess(x: Tensor, guesses: Sequence[Sequence[str]]) -> tuple[Tensor, list[str]]:
    """Sums of x (N, D) by what pictures are taken for, each by that share of its guesses; and the names of the sums."""
    names = sorted({name for some in guesses for name in some})
    place = {name: number for number, name in enumerate(names)}
    told = [(place[name], row, 1 / len(some)) for row, some in enumerate(guesses) for name in some]
    numbers, rows, shares = zip(*told, strict=True)
    size = len(names), len(x)
    values = torch.tensor(shares, dtype=x.dtype)
    return torch.sparse_coo_tensor(torch.tensor([numbers, rows]), values, size, check_invariants=True) @ x, names


def of_tokens(tokens: Tensor) -> Labels:
    """Each row's distinct tokens within the marks, of tokens (M, L)."""
    there = inside(tokens)
    pairs = torch.unique(torch.stack([there.nonzero()[:, 0], tokens[there]], dim=1), dim=0)
    return Labels(pairs[:, 0], pairs[:, 1], torch.ones(len(pairs), device=tokens.device), len(tokens))


def sight(images: Tensor) -> Tensor:
    """H (D, D), of which |H t| is how much a text vector t tells these picture vectors (N, D) apart: a square root of
    their covariance, with a little in every direction and more in that of their mean, which all texts must not have."""
    mean = images.mean(dim=0)
    x = (images - mean).double()
    gram = x.T @ x / len(x)
    level = gram.diagonal().mean()
    along = F.normalize(mean.double(), dim=0)
    gram += level * (SIGHT_FLOOR * torch.eye(len(gram), dtype=gram.dtype) + SIGHT_OF_MEAN * torch.outer(along, along))
    return power(gram, 0.5).float()
