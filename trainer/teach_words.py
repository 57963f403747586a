"""Teaches a trained CLIP's text tower what is read off its picture vectors (`trainer.readout`).

The tower learns to give t + β B y, t being what it gave before, which counts as far as captions hold a text's words:
for captions, for mixtures of their words that nobody wrote, and for phrases with a lexicon's words. So what it says of
a hedgehog, which no caption names, is what pictures say of mammals. What two texts say of the pictures is compared, not
the vectors themselves: most of their directions tell no pictures apart. A token that is a whole word begins with what
is read of the word, and only how tokens go together is left to learn. Sets to keep go on as they were, and so does the
image tower. It knows nothing of files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import HeadraceError
from trainer.augment import words_of
from trainer.contrast import encode_texts
from trainer.optim import MuonAdamW, share_of_rate, split_parameters
from trainer.phrases import Phrases, draw_texts
from trainer.readout import RIDGE, RIDGE_OF_KINDS, Readout, of_tokens, sight
from trainer.speed import quick
from trainer.word_loss import inside

if TYPE_CHECKING:
    from pipeline.clip import Clip
    from trainer.config import ClipTraining
    from trainer.lexicon import Labels, Lexicon
    from trainer.sources import Source

WEIGHT, WEIGHT_OF_KINDS = 2.0, 16.0  # β without and with a lexicon
WORDS = 4096  # read at once
RATE, MATRIX_RATE, WARMUP = 1e-3, 4e-3, 30  # of AdamW, of Muon
PLACED = 0.5  # length of what is added to the token of a word of median length


class Read(NamedTuple):
    """What pictures say of texts: vectors B y (M, D) of M texts, and the square root (D, D) of how pictures vary."""

    vectors: Callable[[Sequence[str]], Tensor]
    sight: Tensor


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
    captions = list(dict.fromkeys(text for source in added for text in source.train.captions if text.strip()))
    held, weight = set(words_of(" ".join(captions))), WEIGHT if lexicon is None else WEIGHT_OF_KINDS
    if (read := _read(clip, added, lexicon, held, stopping)) is None:
        return
    place_words(clip, read, sorted(held.union(() if lexicon is None else lexicon.words)), kept, seed)
    phrases = None if lexicon is None else Phrases(lexicon, captions)
    optimizer = _optimizer(model)
    for step in range(settings.readout_steps):
        if stopping():
            return
        texts = draw_texts(captions, kept, phrases, np.random.default_rng((seed, 2, step)))
        new = [*texts.added, *texts.phrases]
        shares = [1.0] * len(texts.added) + [share_held(text, held) for text in texts.phrases]
        known = torch.tensor(shares, device=clip.device)
        tokens = clip.tokens([*new, *texts.same]).to(clip.device)
        with torch.no_grad(), quick(clip.device):
            old = encode_texts(before, tokens).float()
            wanted = known[:, None] * old[: len(new)] + weight * read.vectors(new).float()
        with quick(clip.device):
            told = encode_texts(model, tokens).float()
        alike = F.cosine_similarity(told[: len(new)] @ read.sight, wanted @ read.sight).mean()
        same = (told[len(new) :] * old[len(new) :]).sum(dim=1)
        loss = 1 - (torch.stack([alike, same.mean()]).mean() if kept else alike)
        if not torch.isfinite(loss):
            raise HeadraceError(f"the loss is not finite at readout step {step}", hint="leave `readout_steps` out")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share_of_rate(step, WARMUP, settings.readout_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield float(loss.detach())


def share_held(text: str, held: Container[str]) -> float:
    """The share of a text's words that captions hold."""
    words = words_of(text)
    return sum(word in held for word in words) / max(1, len(words))


@torch.no_grad()
def place_words(clip: Clip, read: Read, words: Sequence[str], kept: Sequence[Source], seed: int) -> None:
    """Add to the embedding of every token that is one of these words what is read of the word, turned at random; but
    for those that captions to keep have, and towers of another form than open_clip's stock one."""
    table = getattr(clip.model, "token_embedding", None)
    if table is None:
        return
    taken = {
        token
        for source in kept
        for part in _parts(list(dict.fromkeys(source.train.captions)))
        for token in of_tokens(clip.tokens(part)).names.tolist()
    }
    tokens = clip.tokens(words)
    there = inside(tokens)
    alone = there.sum(dim=1) == 1
    single = zip(tokens[alone][there[alone]].tolist(), compress(words, alone.tolist()), strict=True)
    chosen = {token: word for token, word in single if token not in taken}
    if not chosen:
        return
    told = torch.cat([read.vectors(part) @ read.sight for part in _parts(list(chosen.values()))])
    lengths = told.norm(dim=1)
    if not lengths.any():
        return
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(told.shape[1], table.weight.shape[1], generator=generator) / table.weight.shape[1] ** 0.5
    placed = told @ turn.to(told.device) * (PLACED / lengths[lengths > 0].median())
    table.weight[torch.tensor(list(chosen), device=placed.device)] += placed.to(table.weight.dtype)


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + WORDS] for start in range(0, len(texts), WORDS))


def _optimizer(model: Any) -> MuonAdamW:
    """Of all parameters but the image tower's and the scale."""
    tower = {
        name: p for name, p in model.named_parameters() if not name.startswith("visual.") and name != "logit_scale"
    }
    return MuonAdamW(split_parameters(tower, RATE, MATRIX_RATE, weight_decay=0.0), beta1=0.9, beta2=0.98)


def _read(
    clip: Clip,
    sources: Sequence[Source],
    lexicon: Lexicon | None,
    held: Container[str],
    stopping: Callable[[], bool],
) -> Read | None:
    """Of the sets' captioned training pictures, whole and as they are; None where it is asked to stop."""
    vectors, captions, guesses = [], [], []
    for source in sources:
        told = np.array([row for row, text in enumerate(source.train.captions) if text.strip()])
        captions += [source.train.captions[row] for row in told]
        guesses += [source.train.guesses[row] for row in told]
        for small in source.whole(told):
            if stopping():
                return None
            with torch.no_grad():
                vectors.append(clip.model.encode_image(clip.normalized(small.to(clip.device)), normalize=True).float())

    def labels(texts: Sequence[str]) -> list[Labels]:
        if lexicon is None:
            return [of_tokens(clip.tokens(texts))]
        # Of what no caption holds the lexicon knows more than its tokens do.
        known = [" ".join(word for word in words_of(text) if word in held) for text in texts]
        return [of_tokens(clip.tokens(known)), lexicon.labels(texts)]

    images = torch.cat(vectors).cpu()
    share = RIDGE if lexicon is None else RIDGE_OF_KINDS
    read = Readout(images, captions, labels, share, guesses if lexicon is not None else ())
    return Read(lambda texts: read(texts).to(clip.device), sight(images).to(clip.device))
