"""Deformable attention against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d3etr.attention_maps import MASKED_SCORE, SPREAD
from d3etr.detectors.deformable_attention import (
    DeformableAttention,
    Samples,
    _mixed,
    _weighted_sum,
    initialise_deformable,
    sample_values,
)
from d3etr.structures import Levels

LEVELS: Levels = ((4, 6), (2, 3))
TOKENS = 4 * 6 + 2 * 3


def _samples(seed: int = 0, low: float = -0.2, high: float = 1.2) -> Samples:
    """Two images, three queries, two heads, two levels, three points; some outside."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(2, 3, 2, 2, 3, 2, generator=generator) * (high - low) + low
    weights = torch.randn(2, 3, 2, 6, generator=generator).softmax(-1).view(2, 3, 2, 2, 3)
    return Samples(places, weights)


def _splat_by_loops(samples: Samples) -> Tensor:
    """Every sample's weight on the four cells around it, by their areas."""
    maps = torch.zeros(2, 2, 3, TOKENS)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2, 2, 3))).tolist():
        image, query, head, level, point = index
        height, width = LEVELS[level]
        start = sum(h * w for h, w in LEVELS[:level])
        x, y = samples.locations[image, query, head, level, point].tolist()
        x, y = x * width - 0.5, y * height - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    weight = samples.weights[image, query, head, level, point]
                    maps[image, head, query, start + row * width + column] += share * weight
    return maps


def test_splatted_maps_equal_a_loop_over_samples() -> None:
    samples = _samples()
    torch.testing.assert_close(samples.as_maps(None, LEVELS).splatted(), _splat_by_loops(samples))


def test_maps_say_what_was_read() -> None:
    """Reading values is a product with the map: each is the other's proof."""
    samples = _samples(1)
    value = torch.randn(2, TOKENS, 8)
    heads = value.view(2, TOKENS, 2, 4).transpose(1, 2)
    expected = (samples.as_maps(None, LEVELS).splatted() @ heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(sample_values(value, samples, LEVELS), expected)


def test_maps_of_samples_inside_keep_all_mass() -> None:
    maps = _samples(2, low=0.3, high=0.7).as_maps(None, LEVELS).splatted()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3))


def test_scores_are_the_maps_and_little_else() -> None:
    samples = _samples(3)
    maps = samples.as_maps(None, LEVELS).splatted()
    maps = maps + (1 - maps.sum(-1, keepdim=True)) / TOKENS
    found = samples.as_maps(None, LEVELS).scores().softmax(-1)
    torch.testing.assert_close(found, (1 - SPREAD) * maps + SPREAD / TOKENS)


def test_scores_hide_padding_and_keep_all_mass() -> None:
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, 4 * 6 + 3 :] = True
    scores = _samples(4).as_maps(padding, LEVELS).scores()
    assert (scores[1, ..., padding[1]] == MASKED_SCORE).all()
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 2, 3))


def test_a_query_that_samples_nothing_looks_everywhere_alike() -> None:
    scores = _samples(5, low=2.0, high=3.0).as_maps(None, LEVELS).scores()
    torch.testing.assert_close(scores.softmax(-1), torch.full((2, 2, 3, TOKENS), 1 / TOKENS))


def test_maps_teach_where_to_sample() -> None:
    samples = _samples(6, low=0.3, high=0.7)
    places = samples.locations.requires_grad_()
    Samples(places, samples.weights).as_maps(None, LEVELS).scores()[..., 8].sum().backward()
    assert places.grad is not None
    assert places.grad.abs().max() > 0
    assert places.grad.isfinite().all()


@pytest.mark.parametrize("size", [2, 4])
def test_heads_start_in_directions_of_their_own(size: int) -> None:
    attention = DeformableAttention(32, 4, 2, 3)
    initialise_deformable(attention)
    reference = torch.full((1, 1, 2, size), 0.5)
    hidden, tokens = torch.randn(1, 1, 32), torch.randn(1, TOKENS, 32)
    _, samples = attention(
        hidden,
        torch.zeros_like(hidden),
        reference=reference,
        padding=None,
        levels=LEVELS,
        tokens=tokens,
    )
    steps = (samples.locations - 0.5)[0, 0, :, 0]  # [H, P, 2] on the first level
    cells = torch.tensor([6.0, 4.0]) if size == 2 else torch.tensor([3 / 0.25, 3 / 0.25])
    right = (steps * cells)[0]
    torch.testing.assert_close(right, torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
    down = (steps * cells)[1]
    torch.testing.assert_close(down, torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]))
    torch.testing.assert_close(samples.weights, torch.full((1, 1, 4, 2, 3), 1 / 6))


def test_samples_are_mixed_with_the_gradients_of_their_sum() -> None:
    """Exactly: the same products are added up in the same order but over channels."""
    parts = [torch.randn(4, 5, 3, points, requires_grad=True) for points in (2, 3)]
    weights = torch.rand(4, 3, 5, requires_grad=True)
    given = torch.randn(4, 5, 3)
    leaves = [weights, *parts]
    found = torch.autograd.grad(_mixed(weights, parts), leaves, given)
    expected = torch.autograd.grad(_weighted_sum(weights, parts), leaves, given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(_mixed(weights, parts), _weighted_sum(weights, parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_keep_their_digits_where_values_have_few(dtype: torch.dtype) -> None:
    """Values alone are rounded: places that were would miss by a twelfth of a cell of 80."""
    levels: Levels = ((80, 80), (40, 40))
    generator = torch.Generator().manual_seed(8)
    value = torch.randn(1, 8000, 8, generator=generator).to(dtype)
    places = torch.rand(1, 30, 2, 2, 3, 2, generator=generator)
    weights = torch.rand(1, 30, 2, 2, 3, generator=generator).to(dtype).float()

    def sampled(value: Tensor) -> tuple[Tensor, Tensor]:
        where = places.clone().requires_grad_()
        mixed = sample_values(value, Samples(where, weights), levels).float()
        mixed.square().sum().backward()
        assert where.grad is not None
        return mixed.detach(), where.grad

    with torch.autocast("cpu", dtype):
        found, slopes = sampled(value)
    expected, steepness = sampled(value.float())
    few = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9
    assert (found - expected).norm() < few * expected.norm()
    assert (slopes - steepness).norm() < few * steepness.norm()
