"""The ablation's controls, and settings that are refused because they could not fire."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., ConditionalDETR]
BRANCHES = ("adaptive", "fixed")
OFF = {"weight": 0.0}
RANDOM = {"queries": "random", "assignment": "own"}
NO_TERMS = {
    "prediction": {"weight": 0.0},
    "self_attention": {"weight": 0.0},
    "cross_attention": {"weight": 0.0},
}


def build(student: ConditionalDETR, teacher: ConditionalDETR, **settings: object) -> Distiller:
    config = MethodConfig.parse({"method": "d3etr", **settings})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def test_teacher_queries_with_ground_truth_only(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = build(tiny_detector(seed=1), tiny_detector(), **NO_TERMS)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert {name.split("/")[0] for name in losses} == {"detection", "auxiliary"}


def test_random_queries_run_no_teacher(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    group = {"queries": "random", "assignment": "own"}
    module = build(tiny_detector(seed=1), tiny_detector(), auxiliary_group=group, **NO_TERMS)
    teacher = module.run_teacher(images)
    assert teacher is not None and not teacher.groups
    losses = module(images, targets, teacher, module.normalisers(targets, teacher))
    assert {name.split("/")[0] for name in losses} == {"detection", "auxiliary"}
    assert not list(module.method.parameters())


def test_random_queries_follow_the_seed(tiny_detector: Build) -> None:
    group = {"queries": "random", "assignment": "own"}
    first, second = (
        build(tiny_detector(seed=1), tiny_detector(), auxiliary_group=group, **NO_TERMS)
        for _ in range(2)
    )
    assert torch.equal(
        first.state_dict()["method.auxiliary.embedding"],
        second.state_dict()["method.auxiliary.embedding"],
    )


def test_the_teachers_assignment_differs_from_the_own(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    results = []
    for assignment in ("teacher", "own"):
        module = build(
            tiny_detector(seed=1),
            tiny_detector(),
            auxiliary_group={"assignment": assignment},
            **NO_TERMS,
        )
        taught = module.run_teacher(images)
        losses = module(images, targets, taught, module.normalisers(targets, taught))
        results.append(sum(v.item() for k, v in losses.items() if k.startswith("auxiliary/")))
    # The own assignment minimises (nearly) what is summed; the teacher's cannot be cheaper.
    assert results[0] > results[1]


def test_without_ground_truth_the_auxiliary_group_is_only_distilled(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = build(tiny_detector(seed=1), tiny_detector(), auxiliary_group={"ground_truth": False})
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert {name.split("/")[0] for name in losses} == {"detection", "adaptive", "fixed"}


def test_head_counts_that_differ_are_refused_with_the_way_out(tiny_detector: Build) -> None:
    with pytest.raises(UserError, match=r"cross_attention .* 2 heads .* teacher 4.*'mean'"):
        build(tiny_detector(seed=1, heads=2), tiny_detector(), self_attention={"weight": 0.0})


@pytest.mark.parametrize("mapping", [(0,), (1, 0), (0, 5)])
def test_impossible_layer_maps_are_refused(tiny_detector: Build, mapping: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="layer_map"):
        build(tiny_detector(seed=1), tiny_detector(), layer_map=mapping)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "none", "prediction": {"weight": 1.0}}, "no effect on method 'none'"),
        ({"adaptive_ratio": 1.0, **NO_TERMS}, "trains nothing"),
        ({"auxiliary_group": {"ground_truth": False}, **NO_TERMS}, "group would learn nothing"),
        (
            {"adaptive_ratio": 1.0, "teacher_query_ratio": 0.5},
            "adaptive_ratio 1 builds no auxiliary group: remove teacher_query_ratio",
        ),
        (
            {"inherited_ratio": 1.0, "auxiliary_group": {"assignment": "own"}},
            "inherited_ratio 1 builds no auxiliary group: remove auxiliary_group",
        ),
        ({"inherited_ratio": 1.0, "adaptive_ratio": 0.5}, "nothing to mix: remove adaptive_ratio"),
        (
            {"inherited_ratio": 1.0, "matching_cost": {"l1_cost": 1.0}},
            "inherited_ratio 1 runs no bipartite matching: remove matching_cost",
        ),
        ({"inherited_ratio": 0.5, **NO_TERMS}, "inherited_ratio has no effect"),
        ({"inherited_ratio": 1.0, **NO_TERMS}, "inherited_ratio 1 with all term weights 0 trains"),
        ({"adaptive_ratio": 0.0, "matched_pair_ratio": 0.5}, "no bipartite matching"),
        ({"matched_pair_ratio": 0.5, **NO_TERMS}, "matched_pair_ratio has no effect: all term"),
        ({"matching_cost": {"l1_cost": 1.0}, **NO_TERMS}, "matching_cost has no effect: all term"),
        (
            {"method": "detrdistill", "prediction": OFF, "matched_pair_ratio": 0.5},
            "matched_pair_ratio has no effect: all term weights",
        ),
        ({"auxiliary_group": {"queries": "random"}}, "no teacher outputs"),
        (
            {"auxiliary_group": {"ground_truth": False, "assignment": "own"}},
            "assignment 'own' has no effect",
        ),
        (
            {"method": "kd_detr", "auxiliary_group": {"assignment": "own"}},
            "assignment 'own' has no effect",
        ),
        ({"auxiliary_group": {"always": True}}, "always has no effect, the group is built anyway"),
        (
            {"method": "kd_detr", "auxiliary_group": {"always": True}},
            "always has no effect, the group is built anyway",
        ),
        (
            {"auxiliary_group": RANDOM | {"content": "own"}, **NO_TERMS},
            "content 'own' has no effect on random queries",
        ),
        ({"adaptive_ratio": 1.5}, "less than or equal to 1"),
        ({"prediction": {"temperature": 4.0}}, "no effect"),
        ({"matching_cost": {"class_cost": 0.0, "l1_cost": 0.0, "giou_cost": 0.0}}, "all matching"),
    ],
)
def test_settings_that_cannot_fire_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MethodConfig.parse({"method": "d3etr", **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"features": {"queries": 7}, "selection": {"class_loss": "bce"}},
        {"general_points": {"weight": 3.0}, "self_attention": {"weight": 0.0, "heads": "mean"}},
        {"prediction": OFF | {"class_loss": "bce"}},
        {"matching_cost": {"l1_cost": 5.0}, "matched_pair_ratio": 1.0, **NO_TERMS},
        {"adaptive_ratio": 1.0, "auxiliary_group": {"always": True}},
    ],
)
def test_a_term_is_switched_off_without_removing_what_belongs_to_it(
    settings: dict[str, object],
) -> None:
    MethodConfig.parse({"method": "d3etr", **settings})


@pytest.mark.parametrize("kind", ["prediction", "self_attention", "cross_attention"])
def test_layers_are_added_or_averaged(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    student, teacher = tiny_detector(seed=1, decoder_layers=3), tiny_detector()
    found = {}
    for layers in ("sum", "mean", None):
        module = build(student, teacher, **({kind: {"layers": layers}} if layers else {}))
        taught = module.run_teacher(images)
        found[layers] = module(images, targets, taught, module.normalisers(targets, taught))
    names = ("class", "l1", "giou") if kind == "prediction" else (kind,)
    default = "sum" if kind == "prediction" else "mean"
    for name, loss in found[None].items():
        assert loss.item() == found[default][name].item()
        scale = 3 if name.split("/")[0] in BRANCHES and name.split("/")[1] in names else 1
        assert found["sum"][name].item() == pytest.approx(scale * found["mean"][name].item())


def test_cross_attention_to_one_token_is_warned_of(tiny_detector: Build, targets: Targets) -> None:
    images = ImageBatch(torch.randn(3, 3, 4, 4))
    module = build(tiny_detector(seed=1), tiny_detector())
    taught = module.run_teacher(images)
    with pytest.warns(UserWarning, match=r"distillation\.cross_attention is 0 .* one token"):
        losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert losses["fixed/cross_attention"].item() == 0
