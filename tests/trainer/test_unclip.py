"""Pictures from text and from pictures: seeds, guidance, inversion, masks and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.base import HeadraceError
from pipeline.clip import Clip, load
from tests.trainer import tiny
from trainer.cascade import How, decoder_denoise, imagine
from trainer.sampling import dynamic_clip, guide, guide_two, slerp
from trainer.unclip import BATCH, UnClip

QUICK = How(prior_steps=3, steps=4, large_steps=3)
TEXTS = ["a red circle on the left of a blue square", "two green stars"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def whole(clip: Clip) -> UnClip:
    return UnClip(clip, tiny.prior(clip), tiny.decoder(clip), tiny.upsampler(clip))


def soft(seed: int, side: int = 16) -> np.ndarray:
    """A picture without extremes, so that nothing is clipped."""
    values = np.random.default_rng(seed).uniform(60, 200, (4, 4, 3))
    return values.repeat(side // 4, 0).repeat(side // 4, 1).astype(np.uint8)


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_a_picture_is_its_texts_and_seeds_whatever_the_batch(whole: UnClip) -> None:
    """To the bit, among any number of others."""
    texts, seeds = TEXTS * 5, [1, 2, 3, 1, 4, 5, 6, 7, 8, 9]
    for n in (1, 2):
        together = whole.sample(texts, seeds, n, QUICK)
        assert together.shape == (10, 16, 16, 3) and together.dtype == np.uint8
        for rows in (slice(0, 1), slice(3, 4), slice(9, 10), slice(2, 7)):
            assert np.array_equal(whole.sample(texts[rows], seeds[rows], n, QUICK), together[rows])
        assert apart(together[0], together[2]) > 20 and apart(together[1], together[3]) > 20
    varied = whole.vary(soft(1), range(10), how=QUICK)
    assert np.array_equal(whole.vary(soft(1), [7], how=QUICK)[0], varied[7])
    redrawn = whole.vary(soft(1), range(10), 0.5, QUICK)
    assert np.array_equal(whole.vary(soft(1), [7], 0.5, QUICK)[0], redrawn[7])


def test_all_networks_see_batches_of_one_size(clip: Clip) -> None:
    unclip = UnClip(clip, tiny.prior(clip), tiny.decoder(clip), tiny.upsampler(clip))
    sizes: set[tuple[str, int]] = set()
    for name in ("_prior", "_decoder", "_upsampler"):
        network = getattr(unclip, name)
        network.register_forward_pre_hook(lambda _, given, name=name: sizes.add((name, len(given[0]))))
    for count in (1, 3, 9):
        unclip.sample([TEXTS[0]] * count, range(count), how=QUICK)
    assert sizes == {("_prior", 2 * BATCH), ("_decoder", 2 * BATCH), ("_upsampler", BATCH)}  # two for guidance


def test_the_best_of_n_is_the_one_nearest_to_its_text(whole: UnClip) -> None:
    texts, seeds = TEXTS * 4, range(8)
    words = whole.words(texts).vectors
    singles = whole.sample(texts, seeds, how=QUICK)
    best = whole.sample(texts, seeds, n=3, how=QUICK)
    scores = [(whole.vectors(list(pictures)) * words).sum(1) for pictures in (singles, best)]
    assert bool((scores[1] >= scores[0] - 1e-6).all()) and bool((scores[1] > scores[0] + 1e-3).any())
    assert np.array_equal(whole.sample(texts, seeds, n=1, how=QUICK), singles)


def test_the_prior_gives_unit_vectors_and_guidance_keeps_the_noised_vector(clip: Clip, whole: UnClip) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    prior = tiny.prior(clip)
    forward = prior.forward

    def spy(zt: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        seen.append((zt, conditions[-1]))
        return forward(zt, t, *conditions)

    prior.forward = spy  # type: ignore[method-assign,assignment]
    words = whole.words(TEXTS)
    found = imagine(prior, words, [1, 2], replace(QUICK, prior_guidance=2.0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    for zt, keep in seen:
        assert keep.tolist() == [True, True, False, False]
        assert torch.equal(zt[:2], zt[2:]) and bool(zt.abs().max() > 0.1)


def test_decoder_guidance(clip: Clip, whole: UnClip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guided denoiser is the algebra of single passes, by two passes where the scales are equal."""
    monkeypatch.setattr("trainer.speed.half_precision", lambda device: False)
    decoder = tiny.decoder(clip)
    words, vectors = whole.words(TEXTS), whole.vectors([soft(0), soft(1)])
    xt, t = 0.1 * torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3)), torch.tensor([400, 400])

    def single(image: bool, text: bool) -> Tensor:
        keep = torch.tensor([image, image]), torch.tensor([text, text])
        return decoder(xt, t, vectors, words.tokens, words.mask, *keep)  # type: ignore[no-any-return]

    both, one, null = single(True, True), single(True, False), single(False, False)
    assert len({round(float(part.sum()), 3) for part in (both, one, null)}) == 3
    for image, text, wanted in (
        (1.0, 1.0, both),
        (2.0, 2.0, guide(both, null, 2)),
        (1.5, 3.0, guide_two(both, one, null, 1.5, 3.0)),
    ):
        how = How(image_guidance=image, text_guidance=text)
        found = decoder_denoise(decoder, vectors, words, how)(xt, t)
        torch.testing.assert_close(found, dynamic_clip(wanted), rtol=1e-4, atol=1e-5)
    silent = decoder_denoise(decoder, vectors, None, How(image_guidance=2.0))(xt, t)
    torch.testing.assert_close(silent, dynamic_clip(guide(one, null, 2)), rtol=1e-4, atol=1e-5)


def test_variations(clip: Clip) -> None:
    """From the noise of a picture eta 0 gives it back; more eta, or fresh noise, moves away."""
    known = UnClip(clip, None, tiny.known_decoder(clip), None)
    picture = soft(0, 8)
    how = How(steps=200, image_guidance=1.0)
    back = known.vary(picture, [1, 2], eta=0.0, how=how)
    assert back.shape == (2, 8, 8, 3) and apart(back[0], picture) <= 2 and np.array_equal(back[0], back[1])
    moved = known.vary(picture, [1, 2], eta=1.0, how=how)
    fresh = known.vary(picture, [1, 2], how=how)
    for pair in (moved, fresh):
        assert apart(pair[0], picture) > 20 and apart(pair[0], pair[1]) > 20


def test_blends_and_edits_start_at_the_picture(clip: Clip) -> None:
    known = UnClip(clip, None, tiny.known_decoder(clip), None)
    how = How(steps=200)
    a, b = soft(0, 8), soft(1, 8)
    blend = known.blend(a, b, [0.0, 0.5, 1.0], 7, how)
    assert apart(blend[0], a) <= 2 and apart(blend[2], b) <= 2
    assert apart(blend[1], a) > 20 and apart(blend[1], b) > 20
    edit = known.edit(a, "a red circle", "a blue circle", [0.0, 0.4], 7, how)
    assert apart(edit[0], a) <= 2
    start, end = known.words(["a red circle", "a blue circle"]).vectors
    towards = torch.nn.functional.normalize(end - start, dim=0)
    own = known.vectors([a])
    moved = float((slerp(own, towards[None], torch.tensor([[0.4]])) - own)[0, 0])  # of what is the known decoder's grey
    shift = float(edit[1].astype(int).mean() - edit[0].astype(int).mean())
    assert shift * moved > 0 and shift / 127.5 == pytest.approx(moved, abs=0.004)  # half a grey level


@pytest.mark.parametrize("enlarged", [True, False])
def test_inpainting_keeps_what_is_known(clip: Clip, enlarged: bool) -> None:
    unclip = UnClip(clip, tiny.prior(clip), tiny.decoder(clip), tiny.upsampler(clip) if enlarged else None)
    side = unclip.side
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    paint = np.zeros((side, side), bool)
    paint[:5, :3] = True
    for n in (1, 2):
        out = unclip.inpaint(picture, paint, TEXTS[0], [1, 2], n, QUICK)
        assert np.array_equal(out[:, ~paint], np.broadcast_to(picture[~paint], (2, *picture[~paint].shape)))
        assert apart(out[0][paint], picture[paint]) >= 5 and apart(out[0], out[1]) >= 5
    assert np.array_equal(unclip.inpaint(picture, np.zeros_like(paint), TEXTS[0], [1], how=QUICK)[0], picture)
    free = unclip.inpaint(picture, np.ones_like(paint), TEXTS[0], [1], how=QUICK)
    assert np.array_equal(free, unclip.sample([TEXTS[0]], [1], how=QUICK))


def test_inpainting_keeps_the_size_and_pixels_of_any_picture(whole: UnClip) -> None:
    height, width = 3 * whole.side + 5, 2 * whole.side
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    paint = np.zeros((height, width), bool)
    paint[10:40, 7:30] = True
    (out,) = whole.inpaint(picture, paint, TEXTS[0], [1], how=QUICK)
    assert np.array_equal(out[~paint], picture[~paint])
    assert apart(out[paint], picture[paint]) >= 5


def test_a_line_thinner_than_a_cell_is_painted(whole: UnClip) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20 * whole.side, 20 * whole.side, 3), np.uint8)
    paint = np.zeros(picture.shape[:2], bool)
    paint[33, 40:200] = True
    drawn = whole.inpaint(picture, paint, TEXTS[0], [1], how=QUICK)[0]
    square = replace(whole.clip.preprocess, height=whole.side, width=whole.side, resize_mode="squash")
    copied = replace(square, height=len(paint), width=len(paint))(square(picture).permute(1, 2, 0).numpy())
    assert apart(drawn[paint], copied.permute(1, 2, 0).numpy()[paint]) >= 5  # not the blurred picture itself


def test_a_text_longer_than_the_context(whole: UnClip) -> None:
    fits = " ".join(["red"] * 46)
    whole.words([fits])
    for count, said in ((47, "49 tokens"), (1000, "over 191 tokens")):
        with pytest.raises(HeadraceError, match=f"{said}, the CLIP reads 48"):
            whole.words([TEXTS[0], " ".join(["red"] * count)])


def test_a_run_without_prior_draws_no_text(clip: Clip) -> None:
    unclip = UnClip(clip, None, tiny.decoder(clip), None)
    with pytest.raises(HeadraceError, match="no prior") as caught:
        unclip.sample(TEXTS, [1, 2], how=QUICK)
    assert caught.value.code == 3 and "--only prior" in str(caught.value.hint)


def test_an_edit_needs_a_difference(whole: UnClip) -> None:
    with pytest.raises(HeadraceError, match="the same"):
        whole.edit(soft(0), "a red circle", "a red circle", [0.2], 0, QUICK)


def test_words_follow_their_texts(whole: UnClip) -> None:
    words = whole.words([TEXTS[1], TEXTS[0], TEXTS[1]])
    alone = whole.words([TEXTS[0]])
    assert torch.equal(words.vectors[0], words.vectors[2]) and not torch.equal(words.vectors[0], words.vectors[1])
    assert torch.equal(words.vectors[1], alone.vectors[0]) and torch.equal(words.tokens[1], alone.tokens[0])
