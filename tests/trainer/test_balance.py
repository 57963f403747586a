"""Pictures' and texts' vectors that vary alike, and the last maps of a CLIP that give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.clip import Clip, load
from tests.trainer.packed import pictures_and_captions, write_kept, write_packed, write_scenes
from trainer.balance import balance, balancing, centring
from trainer.clip_build import build
from trainer.config import ClipConfig, ClipPreprocess, ClipTraining
from trainer.sources import Source, decoded, open_sources


def moment(rows: int, seed: int) -> torch.Tensor:
    """Of random vectors of five numbers, some of which vary more."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, 5, generator=generator).double() @ torch.randn(5, 5, generator=generator).double()
    return vectors.T @ vectors / rows


def test_both_vary_alike() -> None:
    a, b = moment(50, 0), moment(50, 1)
    towards = balancing(a, b, share=0.0)
    inverse = torch.linalg.inv(towards)
    assert torch.allclose(towards, towards.T)
    assert torch.allclose(towards @ a @ towards, inverse @ b @ inverse)
    assert torch.allclose(balancing(b, a, share=0.0), inverse)


def test_what_varies_alike_stays() -> None:
    a = moment(50, 0)
    assert torch.allclose(balancing(a, a), torch.eye(5, dtype=torch.float64))


def test_directions_that_one_side_lacks_are_stretched_by_as_much_as_the_ridge_lets() -> None:
    """Of the mean eigenvalue 1/2 a hundredth is 1/200: (1 + 1/200) / (1/200) = 201, whose fourth root stretches."""
    towards = balancing(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])), share=0.01)
    assert torch.allclose(towards, torch.diag(torch.tensor([201.0**-0.25, 201.0**0.25], dtype=torch.float64)))


def test_unrelated_pairs_of_each_set_are_put_at_0_by_the_least_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    side = torch.tensor([2.0, 2, 2, 0, 0, 0])
    pictures = [5 * torch.randn(40, 6, generator=generator).double() + 1 for _ in range(2)]
    texts = [
        F.normalize(torch.randn(40, 6, generator=generator).double() + where, dim=1) for where in (side, -side.roll(1))
    ]
    shift = centring(pictures, texts)
    for seen, told in zip(pictures, texts, strict=True):
        assert (F.normalize(seen, dim=1) @ told.T).mean().abs() > 0.02
        assert (F.normalize(seen + shift, dim=1) @ told.T).mean().abs() < 1e-6
    means = torch.stack([part.mean(dim=0) for part in texts])
    assert torch.allclose(means.T @ torch.linalg.pinv(means.T) @ shift, shift)  # nothing across all mean texts


def test_sets_whose_texts_are_alike_and_pictures_are_not_are_put_right_together() -> None:
    texts = [torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 1e-6]], dtype=torch.float64)]
    pictures = [torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)]
    shift = centring(pictures, texts)
    assert shift.norm() < 1 and torch.allclose(shift[1], torch.zeros((), dtype=torch.float64), atol=1e-5)


def test_what_is_chance_between_like_sets_is_not_put_right() -> None:
    """Two draws of 200 pictures and texts from one distribution: their mean texts differ by chance alone."""
    generator = torch.Generator().manual_seed(0)

    def drawn(where: float) -> torch.Tensor:
        return F.normalize(torch.randn(200, 32, generator=generator).double() + where, dim=1)

    pictures, texts = [drawn(0.0), drawn(0.3)], [drawn(0.3), drawn(0.3)]
    assert centring(pictures, texts).norm() < 0.2  # 0.9 were it put right


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "residual": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "transformer": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "pooled": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True},
}


def made(vision: dict[str, Any], out: Path, custom: bool = False) -> Clip:
    model = {"embed_dim": 24, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": TEXT, "custom_text": custom}
    config = ClipConfig(model_cfg=model, preprocess_cfg=ClipPreprocess(mean=(0.5,) * 3, std=(0.5,) * 3))
    clip = build(config, 0, None, out, torch.device("cpu"))
    clip.model.eval()
    return clip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    return [write_kept(folder / "kept"), write_packed(folder / "added", rows=8)]


def sources(folders: list[Path], clip: Clip) -> list[Source]:
    return [decoded(one, clip, print) for one in open_sources(folders, ClipTraining(batch=16), seed=0)]


def vectors(clip: Clip, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of all pictures and captions of a set."""
    pictures = torch.cat(list(source.whole(np.arange(len(source.train)))))
    return torch.from_numpy(clip.encode_images(pictures)), torch.from_numpy(clip.encode_texts(source.train.captions))


def lengths(clip: Clip, source: Source) -> torch.Tensor:
    """Vectors of all pictures, not made units."""
    with torch.no_grad():
        pictures: torch.Tensor = clip.model.encode_image(
            clip.normalized(torch.cat(list(source.whole(np.arange(len(source.train))))))
        )
    return pictures


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_last_maps_give_what_the_balance_says(
    tower: str, custom: bool, folders: list[Path], tmp_path: Path
) -> None:
    clip = made(TOWERS[tower], tmp_path, custom=custom)
    given = sources(folders, clip)
    raw, before = [lengths(clip, source) for source in given], [vectors(clip, source) for source in given]
    moments = [sum(part.T @ part / len(part) for part in side) / 2 for side in zip(*before, strict=True)]
    towards = balancing(*moments)
    inverse = torch.linalg.inv(towards)
    texts = [F.normalize(texts.double() @ inverse, dim=1) for _, texts in before]
    pictures = [part.double() @ towards for part in raw]
    shift = centring(pictures, texts) if tower == "residual" else torch.zeros(24)
    assert balance(clip, given, seed=0)
    for source, there, told in zip(given, pictures, texts, strict=True):
        seen, said = vectors(clip, source)
        assert torch.allclose(seen, F.normalize(there + shift, dim=1).float(), atol=1e-4)
        assert torch.allclose(said, told.float(), atol=1e-4)
        if tower == "residual":
            assert (seen @ said.T).mean().abs() < 1e-4


def test_a_tower_whose_last_map_is_another_is_left_as_it_is(folders: list[Path], tmp_path: Path) -> None:
    clip = made({"timm_model_name": "test_vit", "timm_proj": "linear"}, tmp_path)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    assert not balance(clip, sources(folders, clip), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())


def test_right_pairs_whose_cosines_are_small_get_larger_ones(tmp_path: Path) -> None:
    """Texts most of whose length lies where no picture varies."""
    clip = load("mini", "cpu")
    given = sources([write_scenes(tmp_path / "set")], clip)
    seen = torch.linalg.svd(vectors(clip, given[0])[0], full_matrices=False).Vh
    with torch.no_grad():
        away = torch.randn(clip.model.text_projection.shape, generator=torch.Generator().manual_seed(0))
        clip.model.text_projection += away - away @ seen.T @ seen

    def right() -> float:
        pictures, texts = vectors(clip, given[0])
        return float((pictures * texts).sum(dim=1).mean())

    small = right()
    assert balance(clip, given, seed=0)
    assert right() > 3 * small > 0


def test_a_caption_of_many_pictures_counts_once(tmp_path: Path) -> None:
    pictures, captions = pictures_and_captions()
    once = write_packed(tmp_path / "once", captions, pictures=pictures, rows=8)
    many = write_packed(tmp_path / "many", captions[:8] + captions[7:8] * 8, pictures=pictures[:8] + pictures[7:8] * 8)
    balanced = []
    for folder in (once, many):
        clip = load("mini", "cpu")
        assert balance(clip, sources([folder], clip), seed=0)
        balanced.append(clip.model.text_projection)
    assert torch.allclose(*balanced, atol=1e-4)
