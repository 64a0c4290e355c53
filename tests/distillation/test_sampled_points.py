"""Cross-attention that samples: energy distance and smoothed maps against slow loops.

And what both say about the way to the teacher's samples.
"""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from d3etr.attention_maps import MASKED_SCORE, SampledMaps, ScoredMaps
from d3etr.config.distillation import CrossAttentionConfig, MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.losses import sampled_points
from d3etr.losses.attention import attention_loss, blurred_maps
from d3etr.losses.sampled_points import SOFTENING, energy_distance, energy_loss
from d3etr.structures import ImageBatch, Targets

LEVELS = ((8, 8), (4, 4))
ENERGY = CrossAttentionConfig(distance="energy")


def samples(seed: int, points: int = 3, levels: int = 2, heads: int = 4) -> SampledMaps:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, heads, 3, levels, points)  # L, B, H, P
    places = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(*shape[:4], levels * points, generator=generator, dtype=torch.float64)
    weights = weights.softmax(-1).view(shape)
    return SampledMaps(places, weights, LEVELS[:levels])


def by_loops(points: Tensor, weights: Tensor, others: Tensor, shares: Tensor) -> float:
    def mean(a: Tensor, u: Tensor, b: Tensor, v: Tensor) -> float:
        return sum(
            float(u[i] * v[j]) * math.sqrt(float((a[i] - b[j]).square().sum()) + SOFTENING**2)
            for i in range(len(a))
            for j in range(len(b))
        )

    cross = mean(points, weights, others, shares)
    return 2 * cross - mean(points, weights, points, weights) - mean(others, shares, others, shares)


def flat(maps: SampledMaps) -> tuple[Tensor, Tensor]:
    return maps.locations.flatten(4, 5), maps.weights.flatten(4)


@pytest.mark.parametrize("at_once", [2**22, 100])
def test_energy_distance_equals_loops(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with other numbers of points, and when few rows are computed at once."""
    monkeypatch.setattr(sampled_points, "_DISTANCES", at_once)
    (points, weights), (others, shares) = flat(samples(0)), flat(samples(1, points=4, levels=1))
    found = energy_distance(points, weights, others, shares)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        at = tuple(index)
        expected = by_loops(points[at], weights[at], others[at], shares[at])
        assert found[at].item() == pytest.approx(expected, rel=1e-6)


def test_energy_gradients_are_those_of_differences() -> None:
    (points, weights), teacher = flat(samples(0)), flat(samples(1))
    points, weights = points[0, 0, 0], weights[0, 0, 0]
    others, shares = (part[0, 0, 0] for part in teacher)
    assert torch.autograd.gradcheck(
        lambda x, w: energy_distance(x, w, others, shares),
        (points.requires_grad_(), weights.requires_grad_()),
    )


def test_energy_is_0_for_the_same_points_in_any_order_and_above_it_for_others() -> None:
    places, weights = flat(samples(0))
    order = torch.randperm(weights.shape[-1])
    same = energy_distance(places, weights, places[..., order, :], weights[..., order])
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)
    assert (energy_distance(places, weights, *flat(samples(1))) > 0).all()


def test_the_loss_weights_pairs_and_averages_heads_and_layers() -> None:
    student, teacher = samples(0), samples(1)
    pair_weights = torch.rand(2, 2, 3, dtype=torch.float64)
    rows = energy_distance(*(x.float() for x in (*flat(student), *flat(teacher)))).mean(2)
    expected = (rows * pair_weights).sum()
    layers = ENERGY.model_copy(update={"layers": "sum"})
    assert energy_loss(student, teacher, pair_weights, layers) == pytest.approx(expected)
    assert energy_loss(student, teacher, pair_weights, ENERGY) == pytest.approx(expected / 2)
    heads = ENERGY.model_copy(update={"heads": "mean"})
    merged = energy_loss(student, samples(1, heads=2), pair_weights, heads)
    assert merged.isfinite() and merged > 0  # head counts differ
    one = samples(0, heads=1)
    same = energy_loss(one, samples(1, heads=1), pair_weights, heads)
    assert same == pytest.approx(energy_loss(one, samples(1, heads=1), pair_weights, ENERGY))


def test_distances_are_in_longer_sides_of_the_image() -> None:
    place = torch.tensor([0.0, 0.5]).view(1, 1, 1, 1, 1, 1, 2)
    wide = SampledMaps(place, torch.ones(1, 1, 1, 1, 1, 1), ((4, 8),))
    weights = torch.ones(1, 1, 1)
    for shift, distance in (((0.5, 0.0), 0.5), ((0.0, 0.5), 0.25)):
        other = SampledMaps(wide.locations + torch.tensor(shift), wide.weights, wide.levels)
        expected = 2 * math.hypot(distance, SOFTENING) - 2 * SOFTENING
        assert energy_loss(wide, other, weights, ENERGY).item() == pytest.approx(expected, rel=1e-4)


def blurred_by_loops(mass: Tensor, height: int, width: int, deviation: float) -> Tensor:
    """Each cell's mass over its row and column of Gaussian shares, which sum to 1 on the grid."""

    def share(source: int, target: int, side: int) -> float:
        weight = [math.exp(-0.5 * ((k - source) / deviation) ** 2) for k in range(side)]
        return weight[target] / sum(weight)

    found = torch.zeros_like(mass)
    for r, c in torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist():
        for row, column in torch.cartesian_prod(torch.arange(height), torch.arange(width)).tolist():
            part = share(r, row, height) * share(c, column, width)
            found[row * width + column] += mass[r * width + c] * part
    return found


def test_smoothed_maps_equal_loops_and_hide_padding() -> None:
    scores = torch.randn(1, 2, 1, 2, 80)
    padding = torch.zeros(2, 80, dtype=torch.bool)
    padding[1, [7, 15, 79]] = True
    scores = scores.masked_fill(padding[None, :, None, None], MASKED_SCORE)
    found = blurred_maps(ScoredMaps(scores), LEVELS, padding, 1.5).scores()
    mass = scores.softmax(-1)
    for image in range(2):
        parts = torch.split(mass[0, image, 0, 0], [64, 16])
        expected = torch.cat(
            [blurred_by_loops(part, *size, 1.5) for part, size in zip(parts, LEVELS, strict=True)]
        )
        seen = ~padding[image]
        row = found[0, image, 0, 0]
        torch.testing.assert_close(row[seen].exp(), expected[seen], rtol=1e-5, atol=1e-7)
        assert (row[~seen] == MASKED_SCORE).all()
    assert (
        blurred_maps(ScoredMaps(scores), LEVELS, None, 1.5)
        .scores()
        .exp()
        .sum(-1)
        .allclose(torch.ones(1, 2, 1, 2))
    )


Loss = Callable[[SampledMaps, SampledMaps], Tensor]
CELL = 1 / 16


def direction(loss: Loss, cells: float) -> float:
    """Mean cosine of the step that a loss asks for with the way to the teacher's sample.

    One sample a row at random places of a 16 x 16 grid, the teacher's ``cells`` away.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 400
    places = 0.4 + 0.2 * torch.rand(rows, 2, generator=generator)
    angle = 2 * math.pi * torch.rand(rows, generator=generator)
    way = torch.stack([angle.cos(), angle.sin()], -1)
    own = places.view(1, 1, 1, rows, 1, 1, 2).requires_grad_()
    weights = torch.ones(1, 1, 1, rows, 1, 1)
    student = SampledMaps(own, weights, ((16, 16),))
    there = (places.detach() + cells * CELL * way).view_as(own)
    loss(student, SampledMaps(there, weights, ((16, 16),))).backward()
    assert own.grad is not None
    return float(torch.cosine_similarity(-own.grad.view(rows, 2), way, dim=-1).mean())


def by_maps(deviation: float) -> Loss:
    def loss(student: SampledMaps, teacher: SampledMaps) -> Tensor:
        weights = torch.ones(1, 1, student.locations.shape[3])
        grids = student.levels, None, deviation
        pair = (blurred_maps(x, *grids) if deviation else x for x in (student, teacher))
        return attention_loss(*pair, weights, CrossAttentionConfig())

    return loss


def by_energy(student: SampledMaps, teacher: SampledMaps) -> Tensor:
    return energy_loss(student, teacher, torch.ones(1, 1, student.locations.shape[3]), ENERGY)


CELLS = (0.5, 1, 2, 4)


def test_the_divergence_of_maps_is_blind_beyond_a_cell() -> None:
    assert [direction(by_maps(0), cells) > 0.5 for cells in CELLS] == [True, True, False, False]


def test_smoothed_maps_see_further() -> None:
    for deviation, least in ((1.0, 0.96), (2.0, 0.99)):
        assert min(direction(by_maps(deviation), cells) for cells in CELLS) > least


def test_the_energy_distance_points_to_the_teachers_sample_from_anywhere() -> None:
    assert min(direction(by_energy, cells) for cells in CELLS) > 0.999


def test_settings_without_effect_are_refused(tiny_detector: Callable[..., ConditionalDETR]) -> None:
    with pytest.raises(ValidationError, match="blur has no effect on distance 'energy'"):
        CrossAttentionConfig(distance="energy", blur=1.0)
    with pytest.raises(ValidationError, match="self_attention"):
        MethodConfig.parse({"method": "d3etr", "self_attention": {"distance": "energy"}})
    config = MethodConfig.parse({"method": "d3etr", "cross_attention": {"distance": "energy"}})
    sampling = tiny_detector(name="deformable_detr", levels=2, points=2)
    with pytest.raises(UserError, match=r"the teacher \(conditional_detr\) attends to the whole"):
        Distiller(sampling, tiny_detector(), config, SetCriterionConfig(), seed=0)


@pytest.mark.parametrize("term", [{"distance": "energy"}, {"blur": 1.5}], ids=["energy", "blur"])
def test_a_student_learns_by_them_and_has_learnt_what_equals(
    term: dict[str, object],
    tiny_detector: Callable[..., ConditionalDETR],
    images: ImageBatch,
    targets: Targets,
) -> None:
    """Numbers of points and, for the energy distance, of levels may differ."""
    kind = {"name": "deformable_detr", "points": 2, "levels": 2}
    other = {"points": 3, "levels": 3 if "distance" in term else 2}
    config = MethodConfig.parse({"method": "d3etr", "cross_attention": term})
    for teacher, same in ((tiny_detector(**kind), True), (tiny_detector(**kind | other), False)):
        student = tiny_detector(seed=0 if same else 1, **kind)
        module = Distiller(student, teacher, config, SetCriterionConfig(), seed=0)
        taught = module.run_teacher(images)
        losses = module(images, targets, taught, module.normalisers(targets, taught))
        loss = losses["fixed/cross_attention"]
        if same:
            assert loss.item() == pytest.approx(0, abs=1e-5)
            continue
        assert loss > 1e-5
        loss.backward()
        offsets = student.decoder.layers[0].cross_attention.offsets.weight.grad
        assert offsets is not None and offsets.isfinite().all() and offsets.any()
