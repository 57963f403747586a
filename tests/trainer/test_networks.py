"""The networks: shapes, nulls, masks, and what a fresh one predicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import parse_config
from tests.trainer.tiny import woken
from trainer import diffusion
from trainer.conditions import Sizes, Whitening, end_states
from trainer.decoder import Decoder, DecoderConfig
from trainer.layers import Attention, blur
from trainer.prior import Prior, PriorConfig, ResidualPrior, better_of, build_prior
from trainer.sampling import dpm_solver, steps
from trainer.tasks import crops
from trainer.upsampler import Upsampler, UpsamplerConfig, shrunk, worsened

SIZES = Sizes(embedding=16, token=12, context=20, null=2)
KINDS = ("residual", "transformer")
YES, NO = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)


def decoder(groups: int = 0, **changes: object) -> Decoder:
    values = {"side": 16, "patch": 2, "channels": [16, 32], "blocks": 1, "attention": [4], "head": 16, "groups": groups}
    model = Decoder(parse_config(DecoderConfig, {**values, "token_width": 24, **changes}, "test"), SIZES)
    model.null.fit(torch.randn(16), torch.randn(2, 12))
    return model


def prior(kind: str) -> Prior:
    model = build_prior(parse_config(PriorConfig, {"kind": kind, "width": 64, "depth": 2, "head": 16}, "test"), SIZES)
    model.null.fit(torch.randn(16), torch.randn(2, 12))
    return model


def conditions() -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, tokens, and a mask of 3, 9 and 5 tokens."""
    mask = torch.arange(9) < torch.tensor([[3], [9], [5]])
    return F.normalize(torch.randn(3, 16), dim=1), torch.randn(3, 9, 12), mask


T = torch.tensor([1, 500, 999])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("groups", [0, 8])
def test_a_fresh_decoder_predicts_nothing_so_its_loss_is_that_of_the_picture(groups: int) -> None:
    model, schedule = decoder(groups), diffusion.cosine()
    x0, eps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 16, 16)
    guess = model(diffusion.add_noise(schedule, x0, T, eps), T, *conditions(), YES, YES)
    expected = x0.square().flatten(1).mean(1)
    torch.testing.assert_close(diffusion.loss(schedule, "x0", "uniform", guess, x0, eps, T), expected)
    eps_loss = diffusion.loss(schedule, "eps", "uniform", guess, x0, eps, T)
    assert float(eps_loss.detach().mean()) == pytest.approx(1, abs=0.1)


def upsampler(side: int = 16) -> Upsampler:
    values = {"side": side, "crop": 8, "factor": 2, "channels": [16, 32], "blocks": 1, "groups": 8}
    return Upsampler(parse_config(UpsamplerConfig, values, "test"), SIZES)


def test_a_fresh_upsampler_and_transformer_prior_predict_nothing_so_their_loss_is_that_of_what_is_sought() -> None:
    x, small, vectors = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 8, 8), torch.randn(3, 16)
    for guess, sought in (
        (upsampler()(torch.randn(3, 3, 16, 16), T, small), x),
        (prior("transformer")(torch.randn(3, 16), T, *conditions(), YES), vectors),
    ):
        found = diffusion.loss(diffusion.cosine(), "x0", "uniform", guess, sought, torch.randn_like(sought), T)
        torch.testing.assert_close(found, sought.square().flatten(1).mean(1))


@pytest.mark.parametrize("groups", [0, 8])
def test_the_decoders_nulls_forget_the_conditions_and_keep_the_picture(groups: int) -> None:
    model = woken(decoder(groups))
    x, one, other = torch.randn(3, 3, 16, 16), conditions(), conditions()
    assert torch.equal(model(x, T, *one, NO, NO), model(x, T, *other, NO, NO))
    image_only = model(x, T, one[0], *other[1:], YES, NO)
    torch.testing.assert_close(image_only, model(x, T, *one, YES, NO))
    assert not torch.allclose(model(x, T, *one, YES, YES), image_only, atol=1e-3)
    assert not torch.allclose(model(x, T, *one, NO, YES), model(x, T, *one, YES, YES), atol=1e-3)
    assert not torch.allclose(model(x + 1, T, *one, NO, NO), model(x, T, *one, NO, NO), atol=1e-3)
    mixed = model(x, T, *one, torch.tensor([True, False, True]), NO)
    torch.testing.assert_close(mixed[1], model(x, T, *one, NO, NO)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_priors_null_forgets_the_text_and_keeps_the_noised_vector(kind: str) -> None:
    model = woken(prior(kind))
    z, one, other = torch.randn(3, 16), conditions(), conditions()
    null = model(z, T, *one, NO)
    torch.testing.assert_close(null, model(z, T, other[0], other[1], other[2], NO))
    assert not torch.allclose(null, model(z, T, *one, YES), atol=1e-3)
    assert not torch.allclose(null, model(z + 1, T, *one, NO), atol=1e-3)


def test_what_stands_behind_the_end_mark_is_not_seen() -> None:
    image, tokens, mask = conditions()
    changed = torch.where(mask[:, :, None], tokens, 100.0)
    longer, more = F.pad(changed, (0, 0, 0, 4), value=7.0), F.pad(mask, (0, 4))
    x, z = torch.randn(3, 3, 16, 16), torch.randn(3, 16)
    model, other = woken(decoder()), woken(prior("transformer"))
    for variant in ((changed, mask), (longer, more)):
        torch.testing.assert_close(model(x, T, image, *variant, YES, YES), model(x, T, image, tokens, mask, YES, YES))
        torch.testing.assert_close(other(z, T, image, *variant, YES), other(z, T, image, tokens, mask, YES))


def test_the_empty_text_as_itself_is_the_null() -> None:
    model = woken(decoder())
    x, (image, tokens, mask) = torch.randn(3, 3, 16, 16), conditions()
    empty = F.pad(model.null.tokens.expand(3, -1, -1), (0, 0, 0, 7)), torch.arange(9).expand(3, -1) < 2
    torch.testing.assert_close(model(x, T, image, *empty, YES, YES), model(x, T, image, tokens, mask, YES, NO))


def test_a_linear_prior_sees_the_text_alone() -> None:
    linear, weight = prior("linear"), torch.randn(16, 16)
    linear.weight.copy_(weight)  # type: ignore[operator]
    text, tokens, mask = conditions()
    z = torch.randn(3, 16)
    torch.testing.assert_close(linear(z, T, text, tokens, mask, YES), text @ weight.T)
    assert not linear(z, T, text, tokens, mask, NO).any()


def fitted() -> tuple[ResidualPrior, Tensor, Tensor]:
    """A fresh residual prior, the linear map it starts at, and the covariances (2, 16, 16) of all vectors and of what
    that map leaves of them."""
    residual, weight = prior("residual"), torch.randn(16, 16)
    assert isinstance(residual, ResidualPrior)
    both = torch.randn(2, 500, 16) @ torch.randn(2, 16, 16)
    residual.weight.copy_(weight)
    residual.fit_axes(*both)
    return residual, weight, both.mT @ both / 500


def test_a_fresh_residual_prior_gives_the_mean_of_a_normal_vector_under_text_and_noise() -> None:
    """x = W·text + r and z = α·x + σ·ε with r ~ N(0, C): E[x | z, text] by the rules of joint normals. Without a text
    W·text is 0 and C that of all vectors."""
    residual, weight, covariances = fitted()
    text, tokens, mask = conditions()
    z, schedule = torch.randn(3, 16), diffusion.cosine()
    keep = torch.tensor([True, False, True])
    found = residual(z, T, text, tokens, mask, keep)
    for row, t in enumerate(T.tolist()):
        alpha, sigma, linear = schedule.alpha[t], schedule.sigma[t], weight @ text[row] * keep[row]
        cov = covariances[int(keep[row])].double()
        both = alpha**2 * cov + sigma**2 * torch.eye(16)
        expected = linear + alpha * cov @ torch.linalg.solve(both, (z[row] - alpha * linear).double())
        torch.testing.assert_close(found[row], expected.float(), atol=2e-4, rtol=1e-4)


def test_a_fresh_residual_prior_samples_vectors_as_spread_as_those_it_was_fitted_to() -> None:
    residual, weight, (_, cov) = fitted()
    text = F.normalize(torch.randn(1, 16), dim=1).expand(4000, -1)
    tokens, mask, keep = torch.zeros(4000, 0, 12), torch.zeros(4000, 0, dtype=torch.bool), torch.ones(4000).bool()

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        out: Tensor = residual(z, t, text, tokens, mask, keep)
        return out

    with torch.no_grad():
        drawn = dpm_solver(denoise, torch.randn(4000, 16), diffusion.cosine(), steps(1000, 50))
    torch.testing.assert_close(drawn.mean(dim=0), weight @ text[0], atol=0.3, rtol=0)
    found, expected = torch.cov(drawn.T).diagonal().sum(), cov.diagonal().sum()
    assert float(found / expected) == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_along_what_never_varied_a_residual_prior_answers_by_the_text_alone_whatever_its_weights() -> None:
    residual = prior("residual")
    assert isinstance(residual, ResidualPrior)
    seen = torch.randn(2, 5, 16)
    residual.fit_axes(*seen)
    woken(residual)
    text, tokens, mask = conditions()
    found = residual(torch.randn(3, 16), T, text, tokens, mask, YES)
    answer = residual.regression(residual.white_text(text, YES))  # the linear map is 0
    across = torch.linalg.svd(seen[1])[2][5:]  # (11, 16)
    torch.testing.assert_close((found - answer) @ across.T, torch.zeros(3, 11), atol=1e-4, rtol=0)
    assert float((found - answer).norm()) > 0.1


def test_where_all_is_noise_a_fresh_residual_prior_answers_by_the_text_alone() -> None:
    residual = prior("residual")
    with torch.no_grad():
        residual.regression.exit.weight.normal_()  # type: ignore[union-attr]
    text, tokens, mask = conditions()
    end = torch.full((3,), 999)
    answers = [residual(torch.randn(3, 16), end, text, tokens, mask, YES) for _ in range(2)]
    torch.testing.assert_close(*answers, atol=1e-3, rtol=0)
    assert not torch.allclose(answers[0], residual(torch.randn(3, 16), end, text.roll(1, 0), tokens, mask, YES))


def test_the_nearer_of_two_is_kept() -> None:
    text = torch.eye(3)
    near, far = text.clone(), -text
    picked = better_of(
        torch.stack([torch.stack([near[0], far[1], near[2]]), torch.stack([far[0], near[1], far[2]])]), text
    )
    assert torch.equal(picked, text)


def test_whitening_centres_scales_and_can_be_undone() -> None:
    vectors = torch.randn(1000, 4) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    white = Whitening(4)
    white.fit(vectors)
    out = white(vectors)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0)[:3], torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(white.inverse(out), vectors)


def test_end_states_are_those_of_the_last_token() -> None:
    _, tokens, mask = conditions()
    expected = torch.stack([tokens[0, 2], tokens[1, 8], tokens[2, 4]])
    assert torch.equal(end_states(tokens, mask), expected)


def test_the_upsampler_draws_any_size_and_looks_at_the_small_picture() -> None:
    values = {"channels": [16, 32], "side": 32, "crop": 16, "factor": 4, "patch": 2, "groups": 8, "blocks": 1}
    model = woken(Upsampler(parse_config(UpsamplerConfig, values, "test"), SIZES))
    for side in (16, 32):
        x, small = torch.randn(3, 3, side, side), torch.randn(3, 3, side // 4, side // 4)
        assert model(x, T, small).shape == x.shape
        assert not torch.allclose(model(x, T, small), model(x, T, -small), atol=1e-3)


def test_crops_of_small_and_large_pictures_show_the_same() -> None:
    large = F.interpolate(torch.rand(2, 3, 4, 4), size=(32, 32), mode="bilinear") * 2 - 1
    place = torch.tensor([[0, 3], [4, 1]])
    cut, small = crops(large, place * 4, 16), crops(shrunk(large, 4), place, 4)
    assert torch.equal(cut[1], large[1, :, 16:32, 4:20])
    inside = shrunk(cut, 4)[:, :, 1:-1, 1:-1]  # at the edges the filter sees what the crop cut off
    torch.testing.assert_close(inside, small[:, :, 1:-1, 1:-1], atol=0.05, rtol=0)
    assert not torch.allclose(
        inside, crops(shrunk(large, 4), place - 1 + 2 * (place < 1), 4)[:, :, 1:-1, 1:-1], atol=0.05
    )


def test_attention_stands_where_the_config_asks_for_it() -> None:
    for grids in ((), (4,), (8,), (8, 4)):
        unet = decoder(attention=grids).unet
        for level, grid in ((unet.down[0], 8), (unet.down[1], 4), (unet.middle, 4), (unet.up[0], 4), (unet.up[1], 8)):
            assert any(isinstance(part, Attention) for part in level.modules()) == (grid in grids)


@pytest.mark.parametrize("way", ["vector", "tokens"])
def test_either_way_of_a_condition_into_the_decoder_is_enough(way: str) -> None:
    """Into the time embedding, and as tokens that attention sees: one is closed, text and picture still matter."""
    model = woken(decoder())
    closed = ("text_tokens", "image_tokens") if way == "vector" else ("text_vector", "image_vector")
    with torch.no_grad():
        for name in closed:
            for parameter in getattr(model, name).parameters():
                parameter.zero_()
    x, (image, tokens, mask) = torch.randn(3, 3, 16, 16), conditions()
    plain = model(x, T, image, tokens, mask, YES, YES)
    assert not torch.allclose(model(x, T, image.roll(1, 0), tokens, mask, YES, YES), plain, atol=1e-3)
    other = torch.where((torch.arange(9) == mask.sum(1)[:, None] - 1)[:, :, None], -tokens, tokens)  # the end states
    assert not torch.allclose(model(x, T, image, other, mask, YES, YES), plain, atol=1e-3)


def test_the_transformer_prior_looks_back_only() -> None:
    model = woken(prior("transformer"))
    states: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _module, _inputs, out: states.append(out))  # type: ignore[union-attr]
    text, tokens, _ = conditions()
    mask = torch.ones(3, 9, dtype=torch.bool)
    for shift in (0.0, 1.0):
        model(torch.zeros(3, 16) + shift, T, text, tokens, mask, YES)
    before, after = states
    assert torch.equal(before[:, :11], after[:, :11])  # 9 tokens, text vector, time
    assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-3)  # the noised vector and what answers


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_worsening_blurs(sigma: float) -> None:
    small = torch.rand(2, 3, 8, 8)
    worse = worsened(small, sigma, torch.randn(2, 3, 8, 8), torch.zeros(2))
    torch.testing.assert_close(worse, blur(small, 3, sigma))


def test_worsening_adds_so_much_noise() -> None:
    noise = torch.randn(2, 3, 64, 64)
    out = worsened(torch.zeros(2, 3, 64, 64), 0.6, noise, torch.tensor([0.0, 0.5]))
    assert not out[0].any() and float(out[1].std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("groups", [0, 8])
def test_bfloat16_and_channels_last_are_near_float32(groups: int) -> None:
    model = woken(decoder(groups, resample="plain" if groups else "block")).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, known = torch.randn(3, 3, 16, 16), conditions()
    whole = model(x, T, *known, YES, YES)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, T, *known, YES, YES)
    assert half.dtype == torch.float32
    assert float(((half - whole).norm() / whole.norm()).detach()) < 0.05


@pytest.mark.parametrize("kind", [*KINDS, "upsampler"])
def test_the_others_in_bfloat16_are_near_float32(kind: str) -> None:
    if kind == "upsampler":
        model, given = woken(upsampler()), (torch.randn(3, 3, 16, 16), T, torch.randn(3, 3, 8, 8))
    else:
        model, given = woken(prior(kind)), (torch.randn(3, 16), T, *conditions(), YES)  # type: ignore[assignment]
    whole = model(*given)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*given)
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    assert float(((half - whole).norm() / whole.norm()).detach()) < 0.05
