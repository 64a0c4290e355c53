"""QSKD's pairs and losses against loops over layers, images and objects."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from d3etr.config.distillation import MatchingCostConfig, MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou
from d3etr.matching.costs import detection_costs, distillation_costs
from d3etr.methods.qskd import near_objects
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

Build = Callable[..., DetectionTransformer]


def build(student: DetectionTransformer, teacher: DetectionTransformer, **keys: Any) -> Distiller:
    config = MethodConfig.parse({"method": "qskd", **keys})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def giou(first: Tensor, second: Tensor) -> float:
    return float(generalised_iou(cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)))


def near(outputs: DecoderOutputs, targets: Targets, at: tuple[int, int, int]) -> bool:
    objects = targets.boxes_cxcywh[at[1], : targets.counts[at[1]]]
    return any(giou(outputs.boxes_cxcywh[at], box) > 0 for box in objects)


def pair_loss(
    student: DecoderOutputs, s: tuple[int, ...], teacher: DecoderOutputs, t: tuple[int, ...]
) -> float:
    target = teacher.logits[t].sigmoid()
    entropy = binary_cross_entropy_with_logits(student.logits[s], target, reduction="sum")
    distance = (student.boxes_cxcywh[s] - teacher.boxes_cxcywh[t]).abs().sum()
    overlap = giou(student.boxes_cxcywh[s], teacher.boxes_cxcywh[t])
    return float(entropy + 5 * distance) + 2 * (1 - overlap)


def by_loops(
    student: DecoderOutputs, teacher: DecoderOutputs, targets: Targets
) -> tuple[float, float, int]:
    """Positive and negative loss, and how many hard negatives were paired."""
    criterion = SetCriterionConfig()
    ours, theirs = (detection_costs(part, targets, criterion) for part in (student, teacher))
    between = distillation_costs(
        student, teacher, MatchingCostConfig(class_distance="bce", class_cost=1.0)
    )
    positive, negative, found = 0.0, 0.0, 0
    for layer in range(student.layers):
        close = sum(
            near(teacher, targets, (layer, image, query))
            for image in range(len(targets.counts))
            for query in range(teacher.queries)
        )
        for image, count in enumerate(targets.counts):
            at = layer, image
            of_object = [
                {
                    int(c): int(r)
                    for r, c in zip(*linear_sum_assignment(x[at][:, :count]), strict=True)
                }
                for x in (ours, theirs)
            ]
            for one in set(of_object[0]) & set(of_object[1]):
                pair = (*at, of_object[0][one]), (*at, of_object[1][one])
                total = sum(targets.counts)
                positive += pair_loss(student, pair[0], teacher, pair[1]) / total
            costs = between[at].clone()
            for row in range(student.queries):
                for column in range(teacher.queries):
                    both = near(student, targets, (*at, row)) and near(
                        teacher, targets, (*at, column)
                    )
                    costs[row, column] += 0 if both else 1e3
            for row, column in zip(*linear_sum_assignment(costs), strict=True):
                hard = near(student, targets, (*at, row)) and near(teacher, targets, (*at, column))
                matched = row in of_object[0].values() or column in of_object[1].values()
                if hard and not matched:
                    found += 1
                    loss = pair_loss(student, (*at, row), teacher, (*at, column))
                    negative += loss / max(1, close)
    return positive, negative, found


def with_boxes_at(outputs: DecoderOutputs, targets: Targets, seed: int) -> DecoderOutputs:
    """The same with half of the boxes around objects, as a trained decoder has them."""
    generator = torch.Generator().manual_seed(seed)
    boxes = outputs.boxes_cxcywh.clone()
    half = outputs.queries // 2
    index = torch.randint(
        targets.boxes_cxcywh.shape[1], (*boxes.shape[:2], half), generator=generator
    )
    truth = targets.boxes_cxcywh[None].expand(len(boxes), -1, -1, -1)
    chosen = truth.gather(2, index[..., None].expand(-1, -1, -1, 4))
    noise = 1 + 0.2 * torch.randn(chosen.shape, generator=generator)
    boxes[:, :, :half] = (chosen * noise).clamp(0.01, 0.99)
    return replace(outputs, boxes_cxcywh=boxes)


@torch.no_grad()
def test_losses_equal_loops(
    tiny_detector: Build, images: ImageBatch, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_detector(seed=1, queries=9), tiny_detector(queries=12)
    for number, detector in enumerate((student, teacher)):
        plain = detector.decode

        def decode(*given: Any, plain: Any = plain, number: int = number, **keys: Any) -> Any:
            return [with_boxes_at(part, targets, number) for part in plain(*given, **keys)]

        monkeypatch.setattr(detector, "decode", decode)
    module = build(student, teacher)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    memory = student.encode(images)
    ours = student.decode(memory, [student.object_queries(memory)])[0]
    positive, negative, found = by_loops(ours, taught.main, targets)
    assert found >= 2
    for kind, expected in (("positive", positive), ("negative", negative)):
        parts = [losses[f"{kind}/{name}"].item() for name in ("class", "l1", "giou")]
        assert sum(parts) == pytest.approx(expected, rel=1e-4), kind


def test_only_existing_objects_are_near() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.05, 0.05]]).view(1, 1, 2, 4)
    outputs = DecoderOutputs(torch.zeros(1, 1, 2, 3), boxes)
    truth = torch.tensor([[[0.5, 0.6, 0.3, 0.3], [0.1, 0.1, 0.05, 0.05]]])
    for count, expected in ((0, [False, False]), (1, [True, False]), (2, [True, True])):
        targets = Targets(
            torch.zeros(1, 2, dtype=torch.long),
            truth,
            (count,),
            (0,),
            ((8, 8),),
            torch.tensor([count]),
        )
        assert near_objects(outputs, targets)[0, 0].tolist() == expected


def test_every_detector_learns_by_it(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = build(any_detector(seed=1).train(), any_detector(queries=8, width=64))
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    kinds = {name.partition("/")[0] for name in losses} - {"proposals", "denoising", "copies"}
    assert kinds == {"detection", "positive", "negative"}
    torch.stack([*losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_boxes_of_a_student_that_is_its_teacher_are_right(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    teacher = tiny_detector()
    module = build(copy.deepcopy(teacher), teacher)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    for kind in ("positive", "negative"):
        assert losses[f"{kind}/l1"].item() == pytest.approx(0, abs=1e-6)
        assert losses[f"{kind}/giou"].item() == pytest.approx(0, abs=1e-5)


def test_what_is_off_has_no_loss_and_all_off_is_refused(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = build(tiny_detector(seed=1), tiny_detector(), negative_weight=0)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert "positive/l1" in losses and "negative/l1" not in losses
    for off in (
        {"positive_weight": 0, "negative_weight": 0},
        dict.fromkeys(("class_weight", "l1_weight", "giou_weight"), 0),
    ):
        with pytest.raises(ValidationError, match="use method 'none'"):
            MethodConfig.parse({"method": "qskd", **off})
