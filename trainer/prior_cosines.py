"""How near a prior's vectors come to those of true pictures, beside what simpler answers give.

Tensors in, numbers out; both the training loop and `trainer eval` tell these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from trainer.cascade import How, Words, imagine
from trainer.diffusion import cosine
from trainer.sampling import noise_for

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.prior import Prior

ROWS = 256  # at a time


def _one_step(prior: Prior, words: Words, seeds: Sequence[int]) -> Tensor:
    """The prior's answer (B, D) where all is noise, one noise per seed: the mean of the vectors that it expects."""
    device, width = words.vectors.device, words.vectors.shape[1]
    last = torch.full((len(seeds),), len(cosine()) - 1, dtype=torch.int64, device=device)
    keep, noise = torch.ones_like(last, dtype=torch.bool), noise_for(seeds, (width,), device)()
    white = prior(noise, last, words.vectors, words.tokens, words.mask, keep)
    return prior.image.inverse(white.float())


def prior_cosines(
    prior: Prior, words: Words, true: Tensor, simpler: Mapping[str, Tensor], seed: int, how: How
) -> dict[str, float]:
    """Mean cosines to true picture vectors (B, D), of the prior and of `simpler` answers (B, D).

    `sampled`: as the prior is used, the better of two, seeds counting from `seed`; `one_step`: its mean answer.
    `two_samples` are those of a text's samples to one another: about (mean answer's)² where samples differ as the
    pictures of a text do, more the more they are guided.
    """
    chunks = [slice(start, start + ROWS) for start in range(0, len(true), ROWS)]
    first, second = range(seed, seed + len(true)), range(seed + len(true), seed + 2 * len(true))
    sampled = torch.cat([imagine(prior, words.take(c), first[c], how) for c in chunks])
    again = torch.cat([imagine(prior, words.take(c), second[c], how) for c in chunks])
    guesses = {
        "sampled": sampled,
        "one_step": torch.cat([_one_step(prior, words.take(c), first[c]) for c in chunks]),
        **simpler,
    }
    cosines = {name: float(F.cosine_similarity(guess, true).mean()) for name, guess in guesses.items()}
    return cosines | {"two_samples": float(F.cosine_similarity(sampled, again).mean())}
