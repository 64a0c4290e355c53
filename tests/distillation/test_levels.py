"""What corresponds between kinds: feature levels by stride or merged, and contents of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILY

from d3etr.attention_maps import ScoredMaps
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.losses.attention import merged_maps, some_levels
from d3etr.methods.compatibility import shared_levels
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
LEVELS = ((4, 6), (2, 3), (1, 2))


def random_maps(seed: int = 0) -> ScoredMaps:
    generator = torch.Generator().manual_seed(seed)
    return ScoredMaps(torch.randn(2, 1, 2, 3, 32, generator=generator))


def test_levels_that_are_left_out_leave_the_others_proportions() -> None:
    maps = random_maps()
    whole = maps.scores().softmax(-1)
    kept = some_levels(maps, LEVELS, [0, 2]).scores().softmax(-1)
    part = torch.cat([whole[..., :24], whole[..., 30:]], -1)
    torch.testing.assert_close(kept, part / part.sum(-1, keepdim=True))


def test_merged_levels_keep_all_mass_and_its_place() -> None:
    """Point masses on each level, a slow sum over the cells that they cover."""
    whole = torch.zeros(1, 1, 1, 1, 32)
    whole[..., 0] = 0.5  # of the finest level's first cell
    whole[..., 24 + 5] = 0.3  # of the second level's last, rows 2 and 3, columns 4 and 5
    whole[..., 31] = 0.2  # of the third's last, the right half
    maps = ScoredMaps(whole.clamp(min=1e-30).log())
    merged = merged_maps(maps, LEVELS, (4, 6), None).scores().softmax(-1).view(4, 6)
    torch.testing.assert_close(merged.sum(), torch.tensor(1.0))
    assert merged[0, 0] == pytest.approx(0.5, abs=1e-6)
    assert merged[2:, 3:].sum() > 0.3  # bilinear: it reaches a cell further
    assert merged[:, 3:].sum() > merged[:, 1:3].sum()
    # What is already on the grid stays.
    alone = merged_maps(ScoredMaps(maps.scores()[..., :24]), LEVELS[:1], (4, 6), None)
    torch.testing.assert_close(
        alone.scores().softmax(-1), maps.scores()[..., :24].softmax(-1), atol=1e-6, rtol=0
    )


def backbone(stages: int) -> dict[str, Any]:
    widths = (8, 8, 16, 16, 16)[:stages]
    return {"backbone": {"name": "small", "stem_width": 8, "stage_widths": widths}}


def distiller(student: DetectionTransformer, teacher: DetectionTransformer, **cross: Any):
    config = MethodConfig.parse({"method": "d3etr", "cross_attention": cross})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def step(module: Distiller, images: ImageBatch, targets: Targets) -> dict[str, torch.Tensor]:
    taught = module.run_teacher(images, targets=targets)
    losses: dict[str, torch.Tensor] = module(
        images, targets, taught, module.normalisers(targets, taught)
    )
    return losses


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr"])
def test_levels_of_one_stride_correspond_whatever_their_number(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    """A teacher of strides 4, 8 and 16, a student of 8 and 16: its numbers 0, 1 are the 1 and 2."""
    settings = {**FAMILY[kind], "points": 2}
    student = tiny_detector(seed=1, **{**settings, **backbone(4), "levels": 2})
    teacher = tiny_detector(**{**settings, **backbone(4), "levels": 3})
    assert shared_levels(student.config, teacher.config) == ((0, 1), (1, 2))
    with pytest.warns(UserWarning, match=r"strides \[8, 16\] only"):
        module = distiller(student, teacher)
    losses = step(module, images, targets)
    assert losses["fixed/cross_attention"] > 1e-4
    assert shared_levels(student.config, student.config) is None


def test_without_a_shared_stride_levels_are_merged_or_refused(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    student = tiny_detector(seed=1, **{**FAMILY["deformable_detr"], **backbone(2)})
    teacher = tiny_detector(**{**FAMILY["rt_detr"], **backbone(4)})
    with pytest.raises(UserError, match=r"levels to 'merged'"):
        distiller(student, teacher)
    losses = step(distiller(student, teacher, levels="merged"), images, targets)
    assert losses["fixed/cross_attention"] > 1e-4
    losses["fixed/cross_attention"].backward()
    offsets = [p for name, p in student.named_parameters() if "cross_attention.offsets" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in offsets)


@pytest.mark.parametrize(
    ("student", "teacher", "content", "named"),
    [
        ("conditional_detr", "rt_detr", "own", "not for 'conditional_detr'"),
        ("rt_detr", "conditional_detr", "adapted", r"teacher \(conditional_detr\) have no content"),
        ("detr", "rt_detr", "adapted", r"student \(detr\)"),
        ("rf_detr", "rt_detr", "own", "not for 'rf_detr': set it to 'learned'"),
        ("rt_detr", "rf_detr", "learned", "not for 'rt_detr': set it to 'own'"),
    ],
)
def test_contents_without_effect_are_refused(
    tiny_detector: Build, student: str, teacher: str, content: str, named: str
) -> None:
    pair = tiny_detector(seed=1, **FAMILY[student]), tiny_detector(**FAMILY[teacher])
    config = MethodConfig.parse(
        {
            "method": "d3etr",
            "cross_attention": {"weight": 0},
            "auxiliary_group": {"content": content},
        }
    )
    with pytest.raises(UserError, match=named):
        Distiller(*pair, config, SetCriterionConfig(), seed=0)


def test_heads_of_the_two_attentions_are_compared_apart(tiny_detector: Build) -> None:
    settings = {"width": 64, **FAMILY["rf_detr"]}
    student = tiny_detector(seed=1, **settings | {"cross_heads": 8})
    for term, refused in (("self_attention", False), ("cross_attention", True)):
        others = {"self_attention", "cross_attention"} - {term}
        off = {other: {"weight": 0} for other in others}
        config = MethodConfig.parse({"method": "d3etr", **off})
        if not refused:
            Distiller(student, tiny_detector(**settings), config, SetCriterionConfig(), seed=0)
            continue
        with pytest.raises(UserError, match="student has 8 heads and the teacher 4: set heads"):
            Distiller(student, tiny_detector(**settings), config, SetCriterionConfig(), seed=0)


@pytest.mark.parametrize("content", ["own", "adapted"])
def test_both_contents_teach(
    tiny_detector: Build, images: ImageBatch, targets: Targets, content: str
) -> None:
    """Of a wider teacher, the group learns by either; they are not the same."""
    student = tiny_detector(seed=1, **FAMILY["rt_detr"])
    teacher = tiny_detector(**{"width": 64, **FAMILY["rt_detr"]})
    config = MethodConfig.parse({"method": "d3etr", "auxiliary_group": {"content": content}})
    module = Distiller(student, teacher, config, SetCriterionConfig(), seed=0)
    losses = step(module, images, targets)
    assert losses["fixed/l1"].isfinite() and losses["fixed/l1"] > 1e-4
    adapters = [name for name, _ in module.method.named_parameters()]
    assert bool(adapters) == (content == "adapted")


def test_a_merged_map_of_itself_has_no_distance(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = tiny_detector(**FAMILY["rt_detr"])
    student = tiny_detector(**FAMILY["rt_detr"])
    student.load_state_dict(teacher.state_dict())
    losses = step(distiller(student.eval(), teacher, levels="merged"), images, targets)
    assert losses["fixed/cross_attention"].item() == pytest.approx(0.0, abs=1e-5)
