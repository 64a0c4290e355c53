"""Every parameter that is trained gets a gradient in every step: workers wait for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILY, REPRESENTATIVES

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
OFF = {"weight": 0.0}
NO_TERMS = {"prediction": OFF, "self_attention": OFF, "cross_attention": OFF}
ONLY_SELF_ATTENTION = {"prediction": OFF, "cross_attention": OFF}
SHALLOW = {"encoder_layers": 0, "decoder_layers": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "one-decoder-layer": {"decoder_layers": 1},
    "no-encoder": {"encoder_layers": 0},
    "shallow": SHALLOW,
    "one-query": {"queries": 1},
    "frozen-backbone": {
        "backbone": {
            "name": "small",
            "stem_width": 8,
            "stage_widths": (8, 8, 16),
            "trainable": False,
        }
    },
    "one-level-one-point": {"levels": 1, "points": 1},
}
METHODS: dict[str, dict[str, Any]] = {
    "d3etr": {"method": "d3etr"},
    "kd_detr": {"method": "kd_detr", "general_points": {"count": 7}},
    "detrdistill": {"method": "detrdistill"},
    "feature_cosine": {"method": "feature_cosine"},
    "adaptive": {"method": "d3etr", "adaptive_ratio": 1.0},
    "fixed": {"method": "d3etr", "adaptive_ratio": 0.0, "teacher_query_ratio": 0.5},
    "group-without-distillation": {"method": "d3etr", **NO_TERMS},
    "group-without-ground-truth": {
        "method": "d3etr",
        "auxiliary_group": {"ground_truth": False},
        **ONLY_SELF_ATTENTION,
    },
    "random-queries": {
        "method": "d3etr",
        "auxiliary_group": {"queries": "random", "assignment": "own"},
        **NO_TERMS,
    },
    "features": {"method": "d3etr", "adaptive_ratio": 1.0, "features": {"weight": 1.0}, **NO_TERMS},
    "points": {
        "method": "d3etr",
        "adaptive_ratio": 1.0,
        "general_points": {"count": 5},
        **ONLY_SELF_ATTENTION,
    },
}


def _without_gradient(
    student: DetectionTransformer,
    teacher: DetectionTransformer | None,
    settings: dict[str, Any],
    images: ImageBatch,
    targets: Targets,
) -> list[str]:
    config = MethodConfig.parse(settings)
    module = Distiller(student.train(), teacher, config, SetCriterionConfig(), seed=0)
    taught = None if teacher is None else module.run_teacher(images, targets=targets)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) > 10
    return [name for name, parameter in trained.items() if parameter.grad is None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", FAMILY)
def test_every_architecture_trains_all_that_it_has(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str, architecture: str
) -> None:
    settings = FAMILY[kind] | ARCHITECTURES[architecture]
    if "levels" in settings and "deformable" not in kind:
        pytest.skip("it has one level")
    student = tiny_detector(seed=1, **settings)
    assert not _without_gradient(student, None, {"method": "none"}, images, targets)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_every_method_trains_all_that_a_shallow_student_has(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str, method: str
) -> None:
    student = tiny_detector(seed=1, **FAMILY[kind] | SHALLOW)
    teacher = tiny_detector(queries=8, width=64, **FAMILY[kind])
    assert not _without_gradient(student, teacher, METHODS[method], images, targets)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_batch_without_objects_trains_the_same_parameters(
    tiny_detector: Build, images: ImageBatch, kind: str
) -> None:
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    boxes, none = torch.zeros(3, 0, 4), torch.zeros(3, dtype=torch.int64)
    empty = Targets(nothing, boxes, (0, 0, 0), (1, 2, 3), ((32, 40),) * 3, none)
    student = tiny_detector(seed=1, **FAMILY[kind] | SHALLOW)
    teacher = tiny_detector(queries=8, width=64, **FAMILY[kind])
    assert not _without_gradient(student, teacher, METHODS["d3etr"], images, empty)
