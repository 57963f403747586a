"""Losses beside the contrastive one: what stands in a caption is read off its vector, and off its picture's.

One linear head names the words, and which word comes before which, for both kinds of vectors alike, so that a word has
one direction in both. A contrastive loss alone learns a word only once both towers show it a little, and stays long
where neither does; here each learns it from the caption itself. (Words as labels of pictures: Joulin et al. 2016,
"Learning visual features from large weakly supervised data". That this trains faster than contrast: Huang et al. 2024,
"Classification done right for vision-language pre-training".) Order is what tells a caption from its swap.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LABELS = 1 << 14  # words and pairs are hashed into so many
WORD_SEEN, PAIR_SEEN = 2, 4  # texts of a batch that must have a word, or a pair, for it to be asked for
RARE = -3.0  # logit of a label before anything is known
PRIME, PRIME_FIRST, PRIME_SECOND = 1_000_003, 2_654_435_761, 2_246_822_519
MIXED = 20  # low bits of a pair's product that are dropped: those above depend on all of both tokens


class WordHead(nn.Module):
    """Logits of labels from unit vectors, the same for pictures and texts."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(LABELS, dimension))
        self.bias = nn.Parameter(torch.full((LABELS,), RARE))

    def forward(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Unit vectors (B, dimension), label numbers (L,) -> logits (B, L)."""
        logits: Tensor = vectors * vectors.shape[1] ** 0.5 @ self.embedding[labels].T + self.bias[labels]
        return logits


def word_loss(head: WordHead, vectors: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, ...]:
    """For each kind of vectors (B, dimension), the binary cross entropy of all labels per label that is there.

    Words and pairs count equally. tokens (B, N) begin with a start mark and end with the highest number.
    """
    asked = [present(*kind, len(tokens)) for kind in (words(tokens), pairs(tokens))]
    losses = []
    for rows in vectors:
        parts = [
            F.binary_cross_entropy_with_logits(head(rows, labels), there, reduction="sum") / there.sum().clamp_min(1)
            for labels, there in asked
        ]
        losses.append(parts[0] + parts[1])
    return tuple(losses)


def swapped_words_losses(
    head: WordHead, images: Tensor, texts: tuple[Tensor, Tensor], tokens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Logistic losses of telling a caption from its swap by the words and pairs that only one of them has.

    Both have one phrasing, so what differs is what the picture decides; read off images (M, dimension), and off the
    texts: vectors of captions and of their swaps, (M, dimension) each, with tokens (M, N) each. Sums of k logits are
    divided by √k, so that long captions weigh little more than short ones.
    """
    labels, sign = differing(*tokens)
    size = sign.abs().sum(dim=1).clamp_min(1).sqrt()

    def score(vectors: Tensor) -> Tensor:
        told: Tensor = (head(vectors, labels) * sign).sum(dim=1)
        return told / size

    true, false = (score(vectors) for vectors in texts)
    return F.softplus(-score(images)).mean(), F.softplus(torch.cat([-true, false])).mean()


def differing(true: Tensor, false: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (L,) that one of a caption and its swap has, and float32 (M, L): 1 where it is the caption, -1 the swap.

    Every label stands there once: gathering a row twice would make its gradient depend on the order of threads.
    """
    both = torch.cat([true, false])
    names, rows = (torch.cat(parts) for parts in zip(words(both)[:2], pairs(both)[:2], strict=True))
    labels, there = present(names, rows, 1, len(both))
    sign = there[: len(true)] - there[len(true) :]
    used = sign.any(dim=0)
    return labels[used], sign[:, used]


def words(tokens: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels (K,) of all tokens within the marks, the rows (K,) they stand in, and how many rows must share one."""
    there = inside(tokens)
    return tokens[there] * PRIME % LABELS, there.nonzero()[:, 0], WORD_SEEN


def pairs(tokens: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same of all ordered pairs of tokens, the first anywhere before the second."""
    there = inside(tokens)
    first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], 1, device=tokens.device)
    both = there[:, first] & there[:, second]
    label = (tokens[:, first] * PRIME_FIRST + tokens[:, second] * PRIME_SECOND >> MIXED) % LABELS
    return label[both], both.nonzero()[:, 0], PAIR_SEEN


def present(labels: Tensor, rows: Tensor, least: int, count: int) -> tuple[Tensor, Tensor]:
    """The labels (L,) that at least `least` of `count` rows have, and 1 where a row has one, float32 (count, L)."""
    once = torch.unique(labels * count + rows)
    labels, rows = once // count, once % count
    asked = torch.bincount(labels, minlength=LABELS) >= least
    place = asked.cumsum(0) - 1
    known = asked[labels]
    there = torch.zeros(count, int(asked.sum()), device=labels.device)
    there[rows[known], place[labels[known]]] = 1
    return asked.nonzero()[:, 0], there


def inside(tokens: Tensor) -> Tensor:
    """True (B, N) between the start mark and the end mark."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place > 0) & (place < tokens.argmax(dim=1, keepdim=True))
