"""Attention with and without materialised maps, and the maps."""

from __future__ import annotations

import pytest
import torch

from d3etr.attention_maps import MASKED_SCORE, ProductMaps
from d3etr.detectors.attention import SMALL_MEMORY, attend, attend_by_products, split_heads


def _inputs(keys: int, value_width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(keys)
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[1, keys // 2 :] = True
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, keys, 8)
    return query, key, torch.randn(2, 3, keys, value_width), padding


@pytest.mark.parametrize("keys", [10, SMALL_MEMORY + 1])
@pytest.mark.parametrize("value_width", [8, 4])
def test_both_cores_agree(keys: int, value_width: int) -> None:
    query, key, value, padding = _inputs(keys, value_width)
    for mask in (padding, None):
        mixed = attend_by_products(query, key, value, mask, 0.0)
        torch.testing.assert_close(attend(query, key, value, mask, 0.0), mixed)
        assert mixed.shape == (2, 5, 3 * value_width)


def test_scores_are_scaled_and_padded_keys_masked() -> None:
    query, key, _, padding = _inputs(10, 8)
    [scores] = ProductMaps(query[None], key[None], padding).scores()
    expected = query @ key.transpose(-2, -1) / 8**0.5
    torch.testing.assert_close(scores[0], expected[0])
    assert (scores[1, :, :, 5:] == MASKED_SCORE).all()
    torch.testing.assert_close(scores.softmax(-1).sum(-1), torch.ones(2, 3, 5))


def test_heads_are_neighbouring_channels() -> None:
    x = torch.arange(12.0).view(1, 2, 6)
    assert split_heads(x, 2)[0, 1].tolist() == [[3, 4, 5], [9, 10, 11]]
