"""The parts of the networks: attention, blur and time features, against torch's own or a formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.trainer.tiny import woken
from trainer.layers import Attention, attend, blur, time_features


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_written_out_attention_equals_torchs_own() -> None:
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    seen = torch.rand(2, 1, 5, 7) > 0.3
    seen[..., 0] = True
    torch.testing.assert_close(
        attend(query, key, value, seen), F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    )


def test_blur_keeps_what_is_even_and_spreads_a_point() -> None:
    torch.testing.assert_close(blur(torch.full((1, 2, 5, 5), 0.3), 3, 0.6), torch.full((1, 2, 5, 5), 0.3))
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 1
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.36))
    expected = (line / line.sum())[:, None] * (line / line.sum())
    torch.testing.assert_close(blur(point, 3, 0.6)[0, 0, 1:4, 1:4], expected)


def test_times_are_told_apart() -> None:
    features = time_features(torch.arange(1000), 32)
    assert features.shape == (1000, 32) and torch.cdist(features, features).add(torch.eye(1000)).min() > 1e-3


def test_a_large_grid_looks_at_means_of_its_squares() -> None:
    whole, part = (Attention(8, 4, 6, 0, keys) for keys in (0, 4))
    part.load_state_dict(woken(whole).state_dict())
    tokens, mask = torch.randn(2, 3, 6), torch.tensor([[True, True, False], [True, True, True]])
    small = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(part(small, tokens, mask), whole(small, tokens, mask))

    large = torch.randn(2, 8, 8, 8)
    flat = part.norm(large).flatten(2).transpose(1, 2)
    query, key, value = part.qkv(flat).chunk(3, dim=2)
    key, value = (v.view(2, 4, 2, 4, 2, 8).mean(dim=(2, 4)).flatten(1, 2) for v in (key, value))
    added = part.context(tokens).chunk(2, dim=2)
    key, value = torch.cat([added[0], key], dim=1), torch.cat([added[1], value], dim=1)
    seen = F.pad(mask, (0, 16), value=True)[:, None, None]
    heads = [v.view(2, -1, 2, 4).transpose(1, 2) for v in (query, key, value)]
    looked = F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2)
    expected = large + part.out(looked).transpose(1, 2).view(2, 8, 8, 8)
    torch.testing.assert_close(part(large, tokens, mask), expected)
    assert part(torch.randn(1, 8, 7, 5), tokens[:1], mask[:1]).shape == (1, 8, 7, 5)
