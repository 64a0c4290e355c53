"""Every detector of the family as the teacher of every other: it teaches, or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import FAMILY

from d3etr.config.distillation import DistillationConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distillation.distiller import Distiller
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
WITHOUT_MAPS = {"cross_attention": {"weight": 0.0}}


def _distiller(student: DetectionTransformer, teacher: DetectionTransformer, **settings: object):
    config = DistillationConfig.model_validate({"method": "d3etr", **settings})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


@pytest.mark.parametrize("teacher_kind", FAMILY)
@pytest.mark.parametrize("student_kind", FAMILY)
def test_every_pair_distils_or_is_refused_with_a_way_out(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    student_kind: str,
    teacher_kind: str,
) -> None:
    student = tiny_detector(seed=1, **FAMILY[student_kind]).train()
    teacher = tiny_detector(queries=8, width=64, **FAMILY[teacher_kind])
    settings: dict[str, object] = {}
    if student.config.feature_levels != teacher.config.feature_levels:
        with pytest.raises(UserError, match=r"set distillation\.cross_attention\.weight to 0"):
            _distiller(student, teacher)
        settings = WITHOUT_MAPS
    module = _distiller(student, teacher, **settings)
    taught = module.teach(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert all(torch.isfinite(loss) and loss >= -1e-5 for loss in losses.values()), losses
    fixed = {name for name in losses if name.startswith("fixed/")}
    assert len(fixed) == 5 - len(settings)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", FAMILY)
def test_random_queries_are_a_control_for_every_student(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    nothing = {"weight": 0.0}
    module = _distiller(
        tiny_detector(seed=1, **FAMILY[kind]).train(),
        tiny_detector(queries=8),
        prediction=nothing,
        self_attention=nothing,
        cross_attention=nothing,
        auxiliary_group={"queries": "random", "assignment": "own"},
    )
    assert module.teach(images) is None
    losses = module(images, targets, None, module.normalisers(targets, None))
    assert {"auxiliary/class", "auxiliary/l1", "auxiliary/giou"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
