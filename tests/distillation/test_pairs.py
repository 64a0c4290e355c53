"""Every detector of the family as the teacher of every other: it teaches, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tiny import FAMILY

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
WITHOUT_MAPS = {"cross_attention": {"weight": 0.0}}
GROUND_TRUTH = ("detection/", "auxiliary/", "proposals/", "denoising/", "copies/")


def _distiller(student: DetectionTransformer, teacher: DetectionTransformer, **settings: object):
    config = MethodConfig.parse({"method": "d3etr", **settings})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


METHODS: dict[str, dict[str, object]] = {
    "d3etr": {},
    "kd_detr": {"general_points": {"count": 4}},
    "detrdistill": {},
    "feature_cosine": {"levels": "every"},
}
TERMS = {
    "d3etr": {
        f"{branch}/{term}"
        for branch in ("adaptive", "fixed")
        for term in ("class", "l1", "giou", "self_attention", "cross_attention")
    },
    "kd_detr": {
        f"{branch}/{term}" for branch in ("fixed", "general") for term in ("class", "l1", "giou")
    },
    "detrdistill": {"adaptive/class", "adaptive/l1", "adaptive/giou", "features"},
    "feature_cosine": {"features"},
}


def _ensure_everything_learns(
    module: Distiller, images: ImageBatch, targets: Targets, terms: set[str]
) -> None:
    """A step's losses are finite, each of the terms fires, and every parameter has a gradient."""
    taught = module.run_teacher(images, targets=targets)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values()), losses
    distilled = {name for name in losses if not name.startswith(GROUND_TRUTH)}
    assert distilled == terms
    assert all(losses[name] > 1e-7 for name in terms), losses
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def _pairs() -> Iterator[tuple[str, str, str]]:
    """(student, teacher, method): d3etr with all pairs, the others in turns.

    Each of them meets every student and every teacher, and a pair meets one of them.
    """
    others = [method for method in METHODS if method != "d3etr"]
    for row, student in enumerate(FAMILY):
        for column, teacher in enumerate(FAMILY):
            yield student, teacher, "d3etr"
            yield student, teacher, others[(row + column) % len(others)]


@pytest.mark.parametrize(("student_kind", "teacher_kind", "method"), [*_pairs()])
def test_every_pair_distils_or_is_refused_with_a_way_out(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    student_kind: str,
    teacher_kind: str,
    method: str,
) -> None:
    student = tiny_detector(seed=1, **FAMILY[student_kind]).train()
    teacher = tiny_detector(queries=8, width=64, **FAMILY[teacher_kind])
    settings, terms = {"method": method, **METHODS[method]}, TERMS[method]
    levels = [detector.level_strides for detector in (student, teacher)]
    if method == "d3etr" and min(map(len, levels)) < max(map(len, levels)):
        assert {*levels[0]} & {*levels[1]}
        with pytest.warns(UserWarning, match=r"compares feature levels of strides \[8\] only"):
            module = _distiller(student, teacher, **settings)
        _ensure_everything_learns(module, images, targets, terms)
        return
    _ensure_everything_learns(_distiller(student, teacher, **settings), images, targets, terms)
    assert all(parameter.grad is None for parameter in teacher.parameters())


SHAPES: dict[str, dict[str, object]] = {
    "finer": {"backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 16)}},
    "coarser": {"backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 8, 16)}},
    "narrower, shallower": {"width": 32, "decoder_layers": 1, "queries": 3},
    "wider, deeper": {"width": 96, "decoder_layers": 3, "queries": 12},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kinds", [("conditional_detr",) * 2, ("deformable-two-stage", "detr")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_teachers_of_other_strides_widths_depths_and_query_counts_teach(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    shape: dict[str, object],
    kinds: tuple[str, str],
    method: str,
) -> None:
    student = tiny_detector(seed=1, width=64, **FAMILY[kinds[0]]).train()
    teacher = tiny_detector(**{"width": 64, **FAMILY[kinds[1]], **shape})
    settings, terms = {"method": method, **METHODS[method]}, TERMS[method]
    if method == "d3etr" and kinds[0] != kinds[1]:
        settings |= WITHOUT_MAPS
        terms = {name for name in terms if not name.endswith("cross_attention")}
    _ensure_everything_learns(_distiller(student, teacher, **settings), images, targets, terms)


@pytest.mark.parametrize("levels", [(1, 3), (3, 1), (2, 3)])
def test_features_are_learnt_across_numbers_of_levels(
    tiny_detector: Build, images: ImageBatch, targets: Targets, levels: tuple[int, int]
) -> None:
    student, teacher = (
        tiny_detector(seed=seed, name="deformable_detr", points=2, levels=count)
        for seed, count in enumerate(levels)
    )
    module = _distiller(student.train(), teacher, method="detrdistill")
    _ensure_everything_learns(module, images, targets, TERMS["detrdistill"])


@pytest.mark.parametrize("method", ["kd_detr", "d3etr"])
def test_a_softmax_over_one_class_is_refused_with_a_way_out(
    tiny_detector: Build, images: ImageBatch, targets: Targets, method: str
) -> None:
    student, teacher = tiny_detector(seed=1, classes=1).train(), tiny_detector(classes=1)
    few = METHODS[method]
    with pytest.raises(UserError, match=r"one class.*prediction\.class_loss to 'bce'"):
        _distiller(student, teacher, method=method, prediction={"class_loss": "kl"}, **few)
    way_out = {"class_loss": "bce", "temperature": 1.0}
    module = _distiller(student, teacher, method=method, prediction=way_out, **few)
    alone = replace(targets, labels=torch.zeros_like(targets.labels))
    _ensure_everything_learns(module, images, alone, TERMS[method])


@pytest.mark.parametrize(
    ("settings", "queries", "named"),
    [
        ({"matched_pair_ratio": 0.1}, 6, "matched_pair_ratio leaves one"),
        ({"teacher_query_ratio": 0.1}, 6, "teacher_query_ratio leaves one"),
        ({"general_points": {"count": 1}}, 6, r"general_points\.count leaves one"),
        ({}, 1, "matched_pair_ratio leaves one"),
    ],
)
def test_self_attention_of_one_query_is_refused_with_a_way_out(
    tiny_detector: Build,
    images: ImageBatch,
    targets: Targets,
    settings: dict[str, object],
    queries: int,
    named: str,
) -> None:
    student, teacher = tiny_detector(seed=1, queries=queries).train(), tiny_detector()
    with pytest.raises(UserError, match=named + r".*self_attention\.weight to 0"):
        _distiller(student, teacher, **settings)
    module = _distiller(student, teacher, self_attention={"weight": 0.0}, **settings)
    branches = ["adaptive", "fixed", *(["general"] if "general_points" in settings else [])]
    terms = {f"{b}/{t}" for b in branches for t in ("class", "l1", "giou", "cross_attention")}
    _ensure_everything_learns(module, images, targets, terms)


@pytest.mark.parametrize("kind", FAMILY)
def test_random_queries_are_a_control_for_every_student(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    nothing = {"weight": 0.0}
    module = _distiller(
        tiny_detector(seed=1, **FAMILY[kind]).train(),
        tiny_detector(queries=8, **FAMILY[kind]),
        prediction=nothing,
        self_attention=nothing,
        cross_attention=nothing,
        auxiliary_group={"queries": "random", "assignment": "own"},
    )
    teacher = module.run_teacher(images)
    assert teacher is not None and not teacher.groups
    losses = module(images, targets, teacher, module.normalisers(targets, teacher))
    assert {"auxiliary/class", "auxiliary/l1", "auxiliary/giou"} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
