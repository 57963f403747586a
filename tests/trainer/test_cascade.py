"""The prior as it is drawn from, and the upsampler's condition: each against an answer that is known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.cascade import DEFAULT, How, Words, enlarge, imagine
from trainer.conditions import Sizes
from trainer.diffusion import cosine
from trainer.layers import blur
from trainer.prior import LinearPrior, Prior
from trainer.sampling import noise_for, seed_for
from trainer.upsampler import BLUR_SIZE, Upsampler, UpsamplerConfig

SIZES = Sizes(embedding=16, token=12, context=20, null=2)
WIDTH = 16


def words(count: int) -> Words:
    generator = torch.Generator().manual_seed(1)
    vectors = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    return Words(vectors, torch.zeros(count, 3, 12), torch.ones(count, 3, dtype=torch.bool))


def fit(prior: Prior) -> None:
    """Whitening that is no identity."""
    generator = torch.Generator().manual_seed(2)
    prior.image.mean.copy_(torch.randn(WIDTH, generator=generator))
    prior.image.std.copy_(torch.rand(WIDTH, generator=generator) + 0.2)


class Unlearned(Prior):
    """E[x0 | zt] of independent unit normals, whatever the text: the way from noise to a sample is the identity."""

    def forward(
        self, zt: Tensor, t: Tensor, text_emb: Tensor, text_tokens: Tensor, text_mask: Tensor, keep_text: Tensor
    ) -> Tensor:
        alpha, _ = cosine().at(t, zt)
        return alpha * zt


def test_of_two_imagined_vectors_the_nearer_to_the_text_is_taken_and_not_whitened() -> None:
    prior, texts, seeds = Unlearned(SIZES), words(24), range(24)
    fit(prior)
    found = imagine(prior, texts, seeds, How(prior_steps=100))
    starts = [noise_for([seed_for(seed, "prior", number) for seed in seeds], (WIDTH,))() for number in range(2)]
    two = torch.stack([F.normalize(start * prior.image.std + prior.image.mean, dim=1) for start in starts])
    like_text, like_found = ((two * vectors).sum(dim=2) for vectors in (texts.vectors, found))  # (2, 24)
    chosen = like_text.argmax(dim=0)
    assert set(chosen.tolist()) == {0, 1}
    assert torch.equal(like_found.argmax(dim=0), chosen)
    assert float(like_found.amax(dim=0).min()) > 0.98


def test_what_the_linear_prior_says_is_not_exaggerated() -> None:
    prior, texts = LinearPrior(SIZES), words(5)
    fit(prior)
    prior.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)))
    expected = F.normalize(prior.image.inverse(texts.vectors @ prior.weight.T), dim=1)
    found = imagine(prior, texts, range(5), How(prior_guidance=3.0))
    assert float((found * expected).sum(dim=1).min()) > 0.999  # in bfloat16 where that is quicker


def test_an_enlarged_picture_is_drawn_of_the_small_one_blurred() -> None:
    class Spy(Upsampler):
        def forward(self, xt: Tensor, t: Tensor, small: Tensor) -> Tensor:
            self.seen = small
            return torch.zeros_like(xt)

    spy = Spy(UpsamplerConfig(side=16, crop=8, factor=2, channels=(8,), blocks=1, groups=4, blur=0.5), SIZES)
    small = torch.rand(2, 3, 8, 8) * 2 - 1
    assert enlarge(spy, small, range(2), DEFAULT).shape == (2, 3, 16, 16)
    torch.testing.assert_close(spy.seen, blur(small, BLUR_SIZE, 0.5))
    assert not torch.allclose(spy.seen, small, atol=0.05)
