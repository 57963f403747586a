"""Teaches a trained CLIP's text tower what words read off its picture vectors say.

On a small set a text tower learns captions by heart, and says little of others. Words read off picture vectors by
ridge regression know less of captions and more of words. Such a readout is linear in a picture's vector v: with y the
words of a text, and what a lexicon says they are kinds of, its score is v · B y, so B y is a text vector of the same
space. The tower learns to give t + β B y, t being what it gave before: for captions, for mixtures of their words that
nobody wrote, and for the words of the lexicon, where t counts as far as captions hold the words. So what it says of a
hedgehog, which no caption names, is what pictures say of mammals. Sets to keep go on as they were, and so does the
image tower. It knows nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from trainer.augment import words_of
from trainer.contrast import encode_texts
from trainer.lexicon import Labels
from trainer.optim import share_of_rate
from trainer.ridge import ridge_of
from trainer.sources import wrong_captions
from trainer.speed import quick
from trainer.word_loss import inside

if TYPE_CHECKING:
    from pipeline.clip import Clip
    from trainer.config import ClipTraining
    from trainer.lexicon import Lexicon
    from trainer.sources import Source

WEIGHT, RIDGE = 2.0, 0.5  # β, of what is added, and the ridge, of the mean eigenvalue
WEIGHT_OF_KINDS, RIDGE_OF_KINDS = 16.0, 0.03  # the same with a lexicon
SEEN = 2  # captions that must hold a token, or a kind
SHORTEST = 1e-4  # of a text's vector before they are scaled: what is shorter is rounding
BATCH, PICTURES, ROWS = 256, 256, 4096  # texts of a step; pictures encoded, and rows of words made, at once
RATE, WARMUP = 1e-3, 50  # of AdamW
CAPTIONS, WORDS, KEPT = 3, 12, 0.7  # of a mixture: captions and words at most, share of their words
ALONE = 0.7  # share of the lexicon's phrases with one word


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
    the mean eigenvalue is the ridge.

    Raises:
        HeadraceError: no word comes twice, or those that do tell no picture from another; no kind of a lexicon does.
    """

    def __init__(
        self,
        images: Tensor,
        captions: Sequence[str],
        labels: Callable[[Sequence[str]], Sequence[Labels]],
        share: float = RIDGE,
    ) -> None:
        self._labels = labels
        self._known = [Known(sort) for sort in labels(captions)]
        self._shortest = 0.0
        if not all(known.size for known in self._known[1:]):
            hint = "give a lexicon of the captions' language, or leave --lexicon out"
            raise HeadraceError("what the lexicon's words are kinds of is in no two captions", hint=hint)
        mean = images.mean(dim=0)
        x = (images - mean).double()
        parts = [captions[start : start + ROWS] for start in range(0, len(captions), ROWS)]
        product = torch.zeros((), dtype=x.dtype)
        for part, texts in zip(torch.split(x, ROWS), parts, strict=True):
            product = product + part.T @ self._words(texts).double()
        told = ridge_of(x.T @ x, product, share).float()
        # What all pictures share must count for nothing: a text's score would depend on it.
        self._directions = told - torch.outer(mean, mean @ told) / (mean @ mean)
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

    def _words(self, texts: Sequence[str]) -> Tensor:
        """y (M, known): what is known of each text, of length 1."""
        sorts = [known(one) for known, one in zip(self._known, self._labels(texts), strict=True)]
        return F.normalize(torch.cat(sorts, dim=1), dim=1)


def of_tokens(tokens: Tensor) -> Labels:
    """Each row's distinct tokens within the marks, of tokens (M, L)."""
    there = inside(tokens)
    pairs = torch.unique(torch.stack([there.nonzero()[:, 0], tokens[there]], dim=1), dim=0)
    return Labels(pairs[:, 0], pairs[:, 1], torch.ones(len(pairs), device=tokens.device), len(tokens))


def mixture(captions: Sequence[str], rng: np.random.Generator) -> str:
    """Some words of one to three captions, every second time in another order."""
    chosen = rng.integers(len(captions), size=rng.integers(1, CAPTIONS + 1))
    words = " ".join(captions[row] for row in chosen).replace(",", " ").split()
    kept = [word for word in words if rng.random() < KEPT][:WORDS] or words[:1]
    return " ".join(rng.permutation(kept) if rng.random() < 0.5 else kept)


def phrase(lexicon: Lexicon, rng: np.random.Generator) -> str:
    """One or two of the lexicon's words, as a keyword, a noun phrase or a sentence."""
    word = lexicon.a_word(rng)
    article = "an" if word[0] in "aeiou" else "a"
    told = [word, f"{article} {word}", f"{article.capitalize()} {word}."][rng.integers(3)]
    return told if rng.random() < ALONE else f"{lexicon.a_word(rng)}, {told}"


def teach(
    clip: Clip,
    sources: Sequence[Source],
    settings: ClipTraining,
    lexicon: Lexicon | None,
    seed: int,
    stopping: Callable[[], bool],
) -> Iterator[float]:
    """Train the text tower in place, in `settings.readout_steps` steps, each of which yields its loss; ends before them
    where it is asked to stop, with a tower that is half taught.

    Raises:
        HeadraceError: the words of the sets to add tell nothing, or the loss is not finite.
    """
    model: Any = clip.model
    model.eval()
    before = copy.deepcopy(model)
    roles = list(zip(sources, settings.readout, strict=True))
    added, kept = ([source for source, role in roles if role == wanted] for wanted in ("add", "keep"))
    if (read := _readout(clip, added, lexicon, stopping)) is None:
        return
    captions = list(dict.fromkeys(text for source in added for text in source.train.captions if text.strip()))
    held, weight = set(words_of(" ".join(captions))), WEIGHT if lexicon is None else WEIGHT_OF_KINDS
    tower = [p for name, p in model.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    optimizer = torch.optim.AdamW(tower, lr=RATE, betas=(0.9, 0.98), weight_decay=0)
    for step in range(settings.readout_steps):
        if stopping():
            return
        texts = _texts(captions, kept, lexicon, np.random.default_rng((seed, 2, step)))
        new = [*texts.added, *texts.phrases]
        shares = [1.0] * len(texts.added) + [share_held(text, held) for text in texts.phrases]
        known = torch.tensor(shares, device=clip.device)
        tokens = clip.tokens([*new, *texts.same]).to(clip.device)
        with torch.no_grad(), quick(clip.device):
            old = encode_texts(before, tokens).float()
            more = known[:, None] * old[: len(new)] + weight * read(new).float()
            wanted = F.normalize(torch.cat([more, old[len(new) :]]), dim=1)
        with quick(clip.device):
            told = encode_texts(model, tokens)
        loss = 1 - (told.float() * wanted).sum(dim=1).mean()
        if not torch.isfinite(loss):
            raise HeadraceError(f"the loss is not finite at readout step {step}", hint="leave `readout_steps` out")
        optimizer.param_groups[0]["lr"] = RATE * share_of_rate(step, WARMUP, settings.readout_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield float(loss.detach())


def share_held(text: str, held: Container[str]) -> float:
    """The share of a text's words that captions hold."""
    words = words_of(text)
    return sum(word in held for word in words) / max(1, len(words))


def _readout(
    clip: Clip, sources: Sequence[Source], lexicon: Lexicon | None, stopping: Callable[[], bool]
) -> Callable[[Sequence[str]], Tensor] | None:
    """Of the sets' captioned training pictures, whole and as they are; None where it is asked to stop."""
    size = (clip.preprocess.height, clip.preprocess.width)
    vectors, captions = [], []
    for source in sources:
        told = np.array([row for row, text in enumerate(source.train.captions) if text.strip()])
        captions += [source.train.captions[row] for row in told]
        for rows in np.array_split(told, max(1, len(told) // PICTURES)):
            if stopping():
                return None
            roomy = source.pictures.take(rows).float()
            small = F.interpolate(roomy, size=size, mode="bilinear", antialias=True).round().to(torch.uint8)
            with torch.no_grad():
                vectors.append(clip.model.encode_image(clip.normalized(small.to(clip.device)), normalize=True).float())

    def labels(texts: Sequence[str]) -> list[Labels]:
        kinds = [] if lexicon is None else [lexicon.labels(texts)]
        return [of_tokens(clip.tokens(texts)), *kinds]

    share = RIDGE if lexicon is None else RIDGE_OF_KINDS
    read = Readout(torch.cat(vectors).cpu(), captions, labels, share)
    return lambda texts: read(texts).to(clip.device)


class Texts(NamedTuple):
    """One step's texts: of captions, of the lexicon, and those that are to go on as they are."""

    added: list[str]
    phrases: list[str]
    same: list[str]


def _texts(added: Sequence[str], kept: Sequence[Source], lexicon: Lexicon | None, rng: np.random.Generator) -> Texts:
    """A quarter to keep, where there are sets to keep, half of them captions and half wrong ones; of the others, with a
    lexicon, half its phrases; the rest mixtures and captions of what is added, two to one."""
    rest = BATCH // 4 if kept else 0
    phrases = [phrase(lexicon, rng) for _ in range((BATCH - rest) // 2)] if lexicon is not None else []
    count = BATCH - rest - len(phrases)
    mixtures = [mixture(added, rng) for _ in range(2 * count // 3)]
    captions = [added[row] for row in rng.integers(len(added), size=count - len(mixtures))]
    same: list[str] = []
    for number in range(rest // 2):
        train = kept[number % len(kept)].train
        row = int(rng.integers(len(train)))
        caption = train.captions[row]
        wrong = wrong_captions(train, row, caption)
        same += [caption, wrong[int(rng.integers(len(wrong)))] if wrong else caption]
    return Texts([*mixtures, *captions], phrases, same)
