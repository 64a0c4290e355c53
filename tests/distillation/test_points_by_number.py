"""Deformable cross-attention of decoders of one origin, compared point by point."""

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_distiller_identities import Build, distiller, losses_of
from test_sampled_points import LEVELS, samples
from tiny import FAMILY

from d3etr.config.distillation import CrossAttentionConfig, MethodConfig
from d3etr.errors import UserError
from d3etr.losses.sampled_points import point_loss
from d3etr.structures import ImageBatch, Targets

POINTS: dict[str, Any] = {"inherited_ratio": 1.0, "cross_attention": {"distance": "points"}}


@pytest.mark.parametrize("layers", ["mean", "sum"])
def test_the_loss_equals_loops(layers: Any) -> None:
    ours, theirs = samples(0), samples(1)
    weights = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(2))
    config = CrossAttentionConfig(distance="points", layers=layers)
    found = point_loss(ours, theirs, weights, config).item()
    depth, images, heads, pairs, levels, points = ours.weights.shape
    total = 0.0
    for layer in range(depth):
        for image in range(images):
            for pair in range(pairs):
                row = 0.0
                for head in range(heads):
                    for level in range(levels):
                        for point in range(points):
                            at = layer, image, head, pair, level, point
                            q, p = ours.weights[at].item(), theirs.weights[at].item()
                            height, width = LEVELS[level]
                            x, y = (ours.locations[at] - theirs.locations[at]).tolist()
                            row += p * math.log(p / q) + p * (abs(x) * width + abs(y) * height)
                total += weights[layer, image, pair].item() * row / heads
    expected = total / (depth if layers == "mean" else 1)
    assert found == pytest.approx(expected, rel=1e-4)
    assert point_loss(ours, ours, weights, config).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["deformable_detr", "deformable-refined", "deformable-two-stage"])
@pytest.mark.parametrize("ratios", [{}, {"inherited_ratio": 0.5, "adaptive_ratio": 0.0}])
def test_it_is_zero_for_the_teacher_itself_and_reaches_what_samples(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    kind: str,
    ratios: dict[str, float],
) -> None:
    teacher = tiny_detector(**FAMILY[kind])
    settings = POINTS | ratios
    same = losses_of(distiller(copy.deepcopy(teacher), teacher, **settings), images, targets)
    assert abs(same["inherited/cross_attention"].item()) < 1e-5
    student = tiny_detector(seed=1, **FAMILY[kind])
    loss = losses_of(distiller(student, teacher, **settings), images, targets)
    loss["inherited/cross_attention"].backward()
    for name in ("offsets", "weights"):
        attention = student.get_submodule(f"decoder.layers.1.cross_attention.{name}")
        assert attention.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"inherited_ratio": 0.5}, "adaptive pairs are not"),
        ({"cross_attention": {"distance": "points", "heads": "mean"}}, "heads 'mean' does not go"),
        ({"cross_attention": {"distance": "points", "blur": 1.0}}, "blur"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        MethodConfig.parse({"method": "d3etr"} | POINTS | settings)


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        ({}, {}, r"'points' compares sampled points, but the student \(conditional_detr\) and"),
        (
            FAMILY["deformable_detr"] | {"points": 3},
            FAMILY["deformable_detr"],
            "the student samples 3 on each level and the teacher 2",
        ),
    ],
)
def test_detectors_that_it_cannot_compare_are_refused(
    tiny_detector: Build, student: dict[str, Any], teacher: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        distiller(tiny_detector(seed=1, **student), tiny_detector(**teacher), **POINTS)
