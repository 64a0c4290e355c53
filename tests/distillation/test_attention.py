"""Attention distances against their textbook definitions, and where those underflow."""

import math

import pytest
import torch
from torch import Tensor

from d3etr.attention_maps import MASKED_SCORE, ProductMaps, ScoredMaps
from d3etr.config.distillation import AttentionConfig
from d3etr.losses import attention
from d3etr.structures import Levels

SHAPE = (2, 3, 4, 5, 7)  # L, B, H, P, K


def scores(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(SHAPE, generator=generator, dtype=torch.float32)


def attention_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, config: AttentionConfig
) -> Tensor:
    """Of maps given by their scores."""
    return attention.attention_loss(ScoredMaps(student), ScoredMaps(teacher), weights, config)


def resized(
    maps: Tensor,
    levels: Levels,
    target: Levels,
    padding: Tensor | None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Probabilities on other grids."""
    maps_there = attention.resize_maps(ScoredMaps(maps), levels, hidden, target, padding)
    return maps_there.scores().softmax(-1)


def uniform_weights() -> Tensor:
    return torch.full(SHAPE[:2] + SHAPE[3:4], 1 / (SHAPE[1] * SHAPE[3]))


def test_kl_equals_its_definition() -> None:
    student, teacher = scores(0), scores(1)
    target, own = teacher.softmax(-1), student.softmax(-1)
    expected = (target * (target / own).log()).sum(-1).mean()
    loss = attention_loss(student, teacher, uniform_weights(), AttentionConfig())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    student = scores(0).requires_grad_(True)
    teacher = scores(1)
    attention_loss(student, teacher, uniform_weights(), AttentionConfig()).backward()
    share = SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3]
    expected = (student.softmax(-1) - teacher.softmax(-1)) / share
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=1e-7)


def test_averaged_heads_compare_the_mean_map() -> None:
    student, teacher = scores(0), scores(1)
    target, own = teacher.softmax(-1).mean(2), student.softmax(-1).mean(2)
    expected = (target * (target / own).log()).sum(-1).mean()
    config = AttentionConfig(heads="mean")
    loss = attention_loss(
        student, teacher[:, :, :2].repeat(1, 1, 2, 1, 1), uniform_weights(), config
    )
    same = attention_loss(student, teacher, uniform_weights(), config)
    assert same.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-3)


def test_mse_equals_its_definition() -> None:
    student, teacher = scores(0), scores(1)
    expected = (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1).mean()
    loss = attention_loss(student, teacher, uniform_weights(), AttentionConfig(distance="mse"))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_saturated_maps_have_finite_loss_and_a_gradient() -> None:
    student = scores(0, scale=300.0).requires_grad_(True)
    loss = attention_loss(student, scores(1, scale=300.0), uniform_weights(), AttentionConfig())
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 10
    assert student.grad is not None and student.grad.abs().sum() > 0.1


def test_masked_keys_change_nothing() -> None:
    student, teacher = scores(0), scores(1)
    kept = attention_loss(student, teacher, uniform_weights(), AttentionConfig())
    padding = torch.full((*SHAPE[:4], 3), MASKED_SCORE)
    wide = torch.cat([student, padding], -1).requires_grad_(True)
    loss = attention_loss(
        wide, torch.cat([teacher, padding], -1), uniform_weights(), AttentionConfig()
    )
    loss.backward()
    assert loss.item() == pytest.approx(kept.item(), rel=1e-5)
    assert wide.grad is not None and torch.isfinite(wide.grad).all()
    assert (wide.grad[..., SHAPE[4] :] == 0).all()


def test_selecting_pairs_renormalises_rows() -> None:
    maps = ProductMaps(torch.randn(1, 2, 3, 6, 8), torch.randn(1, 2, 3, 6, 8))
    index = torch.tensor([[[4, 1], [0, 5]]])
    chosen = maps.pairs(index).scores().softmax(-1)
    same = ScoredMaps(maps.scores()).pairs(index).scores().softmax(-1)
    torch.testing.assert_close(same, chosen)
    full = maps.scores().softmax(-1)
    expected = full[0, 0, :, [4, 1]][:, :, [4, 1]]
    assert torch.allclose(chosen[0, 0], expected / expected.sum(-1, keepdim=True), atol=1e-6)


def test_resized_maps_keep_the_place_and_skip_padding() -> None:
    maps = torch.full((1, 1, 1, 1, 16), -20.0)
    maps[..., 5] = 0.0  # row 1, column 1 of a 4 x 4 grid
    padding = torch.tensor([[False, False, False, True]])
    found = resized(maps, ((4, 4),), ((2, 2),), padding)
    assert found.argmax().item() == 0
    assert found[..., 3].item() == 0
    assert found.sum().item() == pytest.approx(1.0)


def test_padding_does_not_darken_the_border_of_resized_maps() -> None:
    hidden, padding = torch.zeros(1, 4, 6, dtype=torch.bool), torch.zeros(1, 8, 12).bool()
    hidden[..., 4:] = padding[..., 8:] = True
    even = torch.zeros(1, 1, 1, 1, 24).masked_fill(hidden.flatten(), MASKED_SCORE)
    found = resized(even, ((4, 6),), ((8, 12),), padding.flatten(1), hidden.flatten(1))
    assert torch.allclose(found.view(8, 12)[:, :8], torch.full((8, 8), 1 / 64))


def test_resizing_to_the_same_grid_is_the_identity() -> None:
    maps = torch.randn(1, 2, 3, 4, 12)
    same = ((3, 4),)
    assert torch.allclose(
        resized(maps, same, same, None),
        maps.softmax(-1),
        atol=1e-5,
    )


def test_resizing_keeps_the_mass_of_each_level() -> None:
    maps = torch.randn(1, 2, 3, 4, 8 * 12 + 4 * 6)
    found = resized(maps, ((8, 12), (4, 6)), ((4, 6), (2, 3)), None)
    fine, coarse = maps.softmax(-1).split([96, 24], -1)
    assert torch.allclose(found[..., :24].sum(-1), fine.sum(-1), atol=0.05)
    assert torch.allclose(found[..., 24:].sum(-1), coarse.sum(-1), atol=0.05)


def rounded_product(seed: int) -> ProductMaps:
    """Queries and keys as a pass in bfloat16 makes them; scores of up to about 20."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(3, 4, n, 8, generator=generator) for n in (5, 7))
    return ProductMaps(3 * query.bfloat16(), 2 * key.bfloat16())


def test_maps_of_bfloat16_passes_are_compared_in_float32() -> None:
    kept, exact = [], []
    for maps in (rounded_product(0), rounded_product(1)):
        kept.append(ProductMaps(maps.query[None], maps.key[None]))
        exact.append((maps.query.double() @ maps.key.double().mT)[None] * maps.scale)
    weights, config = torch.full((1, 3, 5), 1 / 15), AttentionConfig()
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention.attention_loss(kept[0], kept[1], weights, config)
    expected = attention_loss(*exact, weights.double(), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
