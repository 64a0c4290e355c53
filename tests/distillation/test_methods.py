"""The other methods: KD-DETR's shared points, DETRDistill's features, what a name stands for."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_distiller_identities import tolerance
from torch import Tensor

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.engine.seeding import derive_seed
from d3etr.losses.features import (
    LEAST,
    feature_loss,
    query_quality,
    resize_tokens,
    target_weights,
)
from d3etr.methods.adapters import GeneralPoints
from d3etr.structures import DecoderOutputs, ImageBatch, ObjectQueries, Targets

Build = Callable[..., DetectionTransformer]
FEW_POINTS = {"general_points": {"count": 7}}


def _distiller(
    student: DetectionTransformer, teacher: DetectionTransformer, **settings: object
) -> Distiller:
    config = MethodConfig.parse(settings)
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def _losses(
    module: Distiller, images: ImageBatch, targets: Targets, step: int = 0
) -> dict[str, Tensor]:
    taught = module.run_teacher(images, step)
    return module(images, targets, taught, module.normalisers(targets, taught))


def _groups(losses: dict[str, Tensor]) -> set[str]:
    return {name.partition("/")[0] for name in losses} - {"proposals", "denoising", "copies"}


@pytest.mark.parametrize(
    ("method", "groups"),
    [
        ("kd_detr", {"detection", "fixed", "general"}),
        ("detrdistill", {"detection", "auxiliary", "adaptive", "features"}),
    ],
)
def test_every_detector_learns_by_every_method(
    any_detector: Build, images: ImageBatch, targets: Targets, method: str, groups: set[str]
) -> None:
    student, teacher = any_detector(seed=1).train(), any_detector(queries=8, width=64)
    settings = FEW_POINTS if method == "kd_detr" else {}
    module = _distiller(student, teacher, method=method, **settings)
    losses = _losses(module, images, targets)
    assert _groups(losses) == groups
    assert all(torch.isfinite(loss) and loss >= -1e-5 for loss in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("method", ["kd_detr", "detrdistill"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(
    any_detector: Build, images: ImageBatch, targets: Targets, method: str
) -> None:
    teacher = any_detector()
    exact = {"prediction": {"class_loss": "focal", "temperature": 1.0}, "layer_map": "uniform"}
    settings = exact | (FEW_POINTS if method == "kd_detr" else {})
    module = _distiller(copy.deepcopy(teacher), teacher, method=method, **settings)
    losses = _losses(module, images, targets)
    taught = {name: loss for name, loss in losses.items() if name.startswith(("fixed", "gen"))}
    taught |= {name: loss for name, loss in losses.items() if name.startswith(("adapt", "feat"))}
    assert taught
    assert all(abs(loss.item()) < tolerance(name) for name, loss in taught.items()), taught


def test_points_follow_seed_and_step(tiny_detector: Build, images: ImageBatch) -> None:
    settings = {"method": "kd_detr", **FEW_POINTS}
    first, second = (_distiller(tiny_detector(1), tiny_detector(), **settings) for _ in range(2))
    drawn = [module.run_teacher(images, step) for module in (first, second) for step in (0, 1)]
    points = [teacher.groups["general"].queries for teacher in drawn if teacher is not None]
    assert len(points) == 4 and points[0].count == 7
    assert torch.equal(points[0].embedding, points[2].embedding)
    assert not torch.equal(points[0].embedding, points[1].embedding)
    reference = points[0].reference_logits
    assert reference is not None and (reference.sigmoid() > 0).all()


def test_a_recipe_has_the_last_word() -> None:
    settings = {
        "method": "kd_detr",
        "prediction": {"temperature": 3.0},
        "general_points": {"count": 5},
    }
    config = MethodConfig.parse(settings)
    assert config.prediction.temperature == 3.0
    assert config.prediction.class_loss == "kl"
    assert config.general_points.count == 5
    assert config.layer_map == "last"
    again = MethodConfig.parse(config.model_dump(exclude=set(config.without_effect)))
    assert again == config


def _outputs(boxes: Tensor, confidence: Tensor) -> DecoderOutputs:
    return DecoderOutputs(confidence.logit()[None, ..., None], boxes[None])


def test_quality_is_confidence_times_overlap(targets: Targets) -> None:
    boxes = torch.full((3, 2, 4), 0.05)
    boxes[0, 0] = targets.boxes_cxcywh[0, 0]
    boxes[0, 1] = targets.boxes_cxcywh[0, 1] * torch.tensor([1.0, 1.0, 0.5, 1.0])
    quality = query_quality(_outputs(boxes, torch.full((3, 2), 0.8)), targets)
    torch.testing.assert_close(quality[0], torch.tensor([0.8, 0.4]))
    assert (quality[1] == 0).all()  # an image without objects


def test_tokens_like_good_queries_count_most() -> None:
    tokens = torch.eye(4)[None]
    states = torch.stack([torch.eye(4)[0], torch.eye(4)[2]])[None]
    weights = target_weights(states, tokens, None, torch.tensor([[0.9, 0.3]]), queries=2)
    expected = torch.tensor([[1.0, LEAST / 0.9, 0.3 / 0.9, LEAST / 0.9]])
    torch.testing.assert_close(weights, expected)
    best_only = target_weights(states, tokens, None, torch.tensor([[0.9, 0.3]]), queries=1)
    assert best_only[0, 2] == pytest.approx(LEAST / 0.9)


def test_the_highest_weight_is_that_of_a_token_of_the_image() -> None:
    tokens = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    states, padding = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[False, False, True]])
    quality = torch.tensor([[0.8]])
    weights = target_weights(states, tokens, padding, quality, queries=1)
    likeness = 0.8 / 2**0.5
    torch.testing.assert_close(weights, torch.tensor([[1.0, LEAST / likeness, 0.0]]))


def test_tokens_of_other_grids_come_from_the_level_of_the_nearest_grid() -> None:
    fine, coarse = torch.arange(16.0), torch.tensor([10.0, 20.0, 30.0, 40.0])
    tokens = torch.cat([fine, coarse])[None, :, None]
    levels = ((4, 4), (2, 2))
    assert resize_tokens(tokens, None, levels, levels) is tokens
    assert torch.equal(resize_tokens(tokens, None, levels, ((2, 2),))[0, :, 0], coarse)
    found = resize_tokens(tokens, None, levels, ((4, 4), (1, 1)))[0, :, 0]
    torch.testing.assert_close(found, torch.cat([fine, torch.tensor([25.0])]))
    # Of a picture of twice the sides, level k learns from level k + 1.
    found = resize_tokens(tokens, None, levels, ((2, 2), (1, 1)))[0, :, 0]
    torch.testing.assert_close(found, torch.cat([coarse, torch.tensor([25.0])]))


def test_resized_tokens_take_nothing_from_under_padding() -> None:
    tokens = torch.full((1, 4, 6), 7.0)
    tokens[..., 4:] = 1e6
    padding = torch.zeros(1, 4, 6, dtype=torch.bool)
    padding[..., 4:] = True
    for size, visible in (((2, 3), 2), ((8, 12), 8), ((3, 5), 3)):
        found = resize_tokens(tokens.view(1, 24, 1), padding.flatten(1), ((4, 6),), (size,))
        torch.testing.assert_close(
            found.view(size)[:, :visible], torch.full((size[0], visible), 7.0)
        )


def test_features_under_padding_do_not_count() -> None:
    student, teacher = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    padding = torch.tensor([[False, False, True]])
    weights = torch.tensor([[1.0, 0.5, 1.0]])
    loss = feature_loss(student, teacher, weights, padding, torch.tensor(1.0))
    assert loss.item() == pytest.approx((1 + 0.25) / 2)


def test_general_points_are_drawn_from_the_seeds_of_real_runs() -> None:
    like = ObjectQueries(torch.randn(9, 4), torch.randn(9, 2))
    points = [GeneralPoints(5, derive_seed(run, "queries")) for run in (0, 1)]
    first, again, next_step, other = (
        p.draw(like, step).embedding
        for p, step in ((points[0], 3), (points[0], 3), (points[0], 4), (points[1], 3))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step) and not torch.equal(first, other)


def test_general_points_of_an_image_depend_on_its_own_queries_alone() -> None:
    like = ObjectQueries(torch.randn(3, 9, 4), torch.randn(3, 9, 4), torch.randn(3, 9, 4))
    one = ObjectQueries(*(part[1:2] for part in (like.embedding, like.reference_logits)))
    points = GeneralPoints(5, 0)
    whole, alone = points.draw(like, 2), points.draw(one, 2)
    assert whole.embedding.shape == (3, 5, 4) and whole.content is not None
    assert torch.equal(whole.embedding[1:2], alone.embedding)
    assert whole.reference_logits is not None and alone.reference_logits is not None
    assert torch.equal(whole.reference_logits[1:2], alone.reference_logits)
    sizes = whole.reference_logits[1, :, 2:]
    assert all(
        any(torch.equal(size, own) for own in one.reference_logits[0, :, 2:]) for size in sizes
    )


def test_general_points_of_a_lone_query_are_finite() -> None:
    drawn = GeneralPoints(5, 0).draw(ObjectQueries(torch.randn(1, 4), torch.randn(1, 2)), 0)
    assert drawn.embedding.isfinite().all()
