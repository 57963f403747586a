"""Teaches a trained CLIP's text tower what words read off its picture vectors say.

On a small set a text tower learns captions by heart, and says little of others. Words read off picture vectors by
ridge regression know less of captions and more of words. Such a readout is linear in a picture's vector v: with y the
words of a text, its score is v · B y, so B y is a text vector of the same space. The tower learns to give
t + β B y / |y|, t being what it gave before: for captions, and for mixtures of their words that nobody wrote. Sets to
keep go on as they were, and so does the image tower. It knows nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from trainer.contrast import encode_texts
from trainer.optim import share_of_rate
from trainer.ridge import ridge_of
from trainer.sources import wrong_captions
from trainer.speed import quick
from trainer.word_loss import inside

if TYPE_CHECKING:
    from pipeline.clip import Clip
    from trainer.config import ClipTraining
    from trainer.sources import Source

WEIGHT = 2.0  # β, of what is added
RIDGE = 0.5  # of the mean eigenvalue
SEEN = 2  # captions that must hold a token
SHORTEST = 1e-4  # of a text's vector before they are scaled: what is shorter is rounding
BATCH, PICTURES, ROWS = 256, 256, 4096  # texts of a step; pictures encoded, and rows of words made, at once
RATE, WARMUP = 1e-3, 50  # of AdamW
CAPTIONS, WORDS, KEPT = 3, 12, 0.7  # of a mixture: captions and words at most, share of their words


class Readout:
    """Text vectors of words, from picture vectors (N, D) and the tokens (N, L) of their captions.

    Raises:
        HeadraceError: no word comes twice, or those that do tell no picture from another.
    """

    def __init__(self, images: Tensor, tokens: Tensor) -> None:
        counts = torch.bincount(_once(tokens)[1], minlength=int(tokens.max()) + 1)
        self._place = torch.where(counts >= SEEN, (counts >= SEEN).cumsum(0) - 1, -1)
        self._weight = (len(tokens) / counts[counts >= SEEN]).sqrt()
        mean = images.mean(dim=0)
        x = (images - mean).double()
        product = x.new_zeros(x.shape[1], len(self._weight))
        for part, texts in zip(torch.split(x, ROWS), torch.split(tokens, ROWS), strict=True):
            product += part.T @ self._words(texts).double()
        told = ridge_of(x.T @ x, product, RIDGE).float()
        # What all pictures share must count for nothing: a text's score would depend on it.
        self._directions = told - torch.outer(mean, mean @ told) / (mean @ mean)
        lengths = torch.cat([self(texts).norm(dim=1) for texts in torch.split(tokens, ROWS)])
        if not (lengths > SHORTEST).any():
            hint = "name a set with more words in `training.readout`, or leave `readout_steps` out"
            raise HeadraceError("no words of the sets to `add` tell their pictures apart", hint=hint)
        self._directions /= lengths[lengths > SHORTEST].median()

    def __call__(self, tokens: Tensor) -> Tensor:
        """B y / |y| (M, D) of tokens (M, L): 0 where no word is known; over the captions of a median length of 1."""
        out: Tensor = F.normalize(self._words(tokens), dim=1) @ self._directions.T
        return out

    def _words(self, tokens: Tensor) -> Tensor:
        """The known tokens of each row, each weighted by the root of how seldom it is: (M, known)."""
        rows, found = _once(tokens)
        known = self._place[found] >= 0
        out = torch.zeros(len(tokens), len(self._weight), device=tokens.device)
        out[rows[known], self._place[found[known]]] = 1
        return out * self._weight


def _once(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's distinct tokens within the marks: rows (K,) and tokens (K,)."""
    there = inside(tokens)
    pairs = torch.unique(torch.stack([there.nonzero()[:, 0], tokens[there]], dim=1), dim=0)
    return pairs[:, 0], pairs[:, 1]


def mixture(captions: Sequence[str], rng: np.random.Generator) -> str:
    """Some words of one to three captions, every second time in another order."""
    chosen = rng.integers(len(captions), size=rng.integers(1, CAPTIONS + 1))
    words = " ".join(captions[row] for row in chosen).replace(",", " ").split()
    kept = [word for word in words if rng.random() < KEPT][:WORDS] or words[:1]
    return " ".join(rng.permutation(kept) if rng.random() < 0.5 else kept)


def teach(
    clip: Clip, sources: Sequence[Source], settings: ClipTraining, seed: int, stopping: Callable[[], bool]
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
    if (read := _readout(clip, added, stopping)) is None:
        return
    captions = list(dict.fromkeys(text for source in added for text in source.train.captions if text.strip()))
    tower = [p for name, p in model.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    optimizer = torch.optim.AdamW(tower, lr=RATE, betas=(0.9, 0.98), weight_decay=0)
    for step in range(settings.readout_steps):
        if stopping():
            return
        texts, count = _texts(captions, kept, np.random.default_rng((seed, 2, step)))
        tokens = clip.tokens(texts).to(clip.device)
        with torch.no_grad(), quick(clip.device):
            old = encode_texts(before, tokens).float()
            new = old + WEIGHT * read(tokens).float()
            wanted = F.normalize(torch.cat([new[:count], old[count:]]), dim=1)
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


def _readout(clip: Clip, sources: Sequence[Source], stopping: Callable[[], bool]) -> Readout | None:
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
    return Readout(torch.cat(vectors), clip.tokens(captions).to(clip.device))


def _texts(added: Sequence[str], kept: Sequence[Source], rng: np.random.Generator) -> tuple[list[str], int]:
    """One step's texts: mixtures and captions of what is added, as many as said; then those to keep, half of them
    captions and half wrong ones, where there are."""
    rest = BATCH // 4 if kept else 0
    mixtures = [mixture(added, rng) for _ in range(BATCH // 2)]
    captions = [added[row] for row in rng.integers(len(added), size=BATCH - rest - len(mixtures))]
    same: list[str] = []
    for number in range(rest // 2):
        train = kept[number % len(kept)].train
        row = int(rng.integers(len(train)))
        caption = train.captions[row]
        wrong = wrong_captions(train, row, caption)
        same += [caption, wrong[int(rng.integers(len(wrong)))] if wrong else caption]
    return [*mixtures, *captions, *same], len(mixtures) + len(captions)
