"""Class losses whose target is the IoU equal Hugging Face's of RT-DETR and DEIMv2."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_criterion_parity import COUNTS, LAYERS, as_targets, random_labels, random_outputs
from torch import Tensor

from d3etr.config.training import SetCriterionConfig
from d3etr.losses.set_criterion import detection_problem, set_losses
from d3etr.matching.assignment import assign
from d3etr.structures import DecoderOutputs, Targets

rt_detr = pytest.importorskip("transformers.loss.loss_rt_detr")
deimv2 = pytest.importorskip("transformers.loss.loss_deimv2")
lw_detr = pytest.importorskip("transformers.loss.loss_lw_detr")
CLASSES = 7


def their_config(config: SetCriterionConfig) -> Any:
    """What RTDetrLoss and Deimv2Loss read of a configuration."""
    alpha, gamma = config.quality_parameters
    return SimpleNamespace(
        num_labels=CLASSES,
        eos_coefficient=0.1,
        weight_loss_vfl=config.class_weight,
        weight_loss_mal=config.class_weight,
        weight_loss_bbox=config.l1_weight,
        weight_loss_giou=config.giou_weight,
        weight_loss_fgl=0.0,
        weight_loss_ddf=0.0,
        focal_loss_alpha=alpha,
        focal_loss_gamma=gamma,
        mal_alpha=None if alpha == 1 else alpha,
        use_dense_one_to_one=False,
        use_focal_loss=True,
        matcher_class_cost=config.class_cost,
        matcher_bbox_cost=config.l1_cost,
        matcher_giou_cost=config.giou_cost,
        matcher_alpha=config.focal_alpha,
        matcher_gamma=config.focal_gamma,
        max_num_bins=32,
        reg_scale=4.0,
        up=0.5,
    )


def of_layer(outputs: DecoderOutputs, layer: int) -> dict[str, Tensor]:
    return {"logits": outputs.logits[layer], "pred_boxes": outputs.boxes_cxcywh[layer]}


def our_losses(
    outputs: DecoderOutputs, targets: Targets, config: SetCriterionConfig
) -> dict[str, Tensor]:
    [assignment] = assign([detection_problem("test", outputs, targets, config)])
    objects = targets.num_objects.sum().float()
    return set_losses(outputs, targets, assignment, objects, config)


def assert_same_gradients(ours: Tensor, theirs: Tensor, outputs: DecoderOutputs) -> None:
    inputs = [outputs.logits, outputs.boxes_cxcywh]
    for mine, other in zip(
        *(torch.autograd.grad(loss, inputs) for loss in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0), (30, 1, 0, 2)])
@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("vfl", {"class_loss": "varifocal"}),
        ("vfl", {"class_loss": "varifocal", "quality_alpha": 0.4, "quality_gamma": 1.3}),
        ("mal", {"class_loss": "mal"}),
        ("mal", {"class_loss": "mal", "quality_alpha": 0.4, "quality_gamma": 2.0}),
    ],
)
def test_losses_and_gradients_equal_hugging_faces(
    key: str, settings: dict[str, Any], counts: tuple[int, ...]
) -> None:
    config = SetCriterionConfig(**settings)
    outputs, labels = random_outputs(), random_labels(counts)
    ours = our_losses(outputs, as_targets(labels), config)
    kind = rt_detr.RTDetrLoss if key == "vfl" else deimv2.Deimv2Loss
    criterion = kind(their_config(config))
    number = max(sum(counts), 1)
    theirs = dict.fromkeys(("class", "l1", "giou"), torch.zeros(()))
    for layer in range(LAYERS):
        part = of_layer(outputs, layer)
        indices = criterion.matcher(part, labels)
        class_loss = getattr(criterion, f"loss_labels_{key}")(part, labels, indices, number)
        boxes = rt_detr.RTDetrLoss.loss_boxes(criterion, part, labels, indices, number)
        found = class_loss | boxes
        for name, theirs_key in (
            ("class", f"loss_{key}"),
            ("l1", "loss_bbox"),
            ("giou", "loss_giou"),
        ):
            theirs[name] = theirs[name] + found[theirs_key]
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6)
    assert_same_gradients(sum(ours.values()), sum(theirs.values()), outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0, 0), (30, 1, 0, 2)])
def test_the_iou_aware_cross_entropy_equals_lw_detrs(counts: tuple[int, ...]) -> None:
    config = SetCriterionConfig(class_loss="ia_bce", class_weight=1.0)
    outputs, labels = random_outputs(), random_labels(counts)
    ours = our_losses(outputs, as_targets(labels), config)
    matcher = lw_detr.LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    kinds = ["labels", "boxes"]
    criterion = lw_detr.LwDetrImageLoss(matcher, CLASSES, 0.25, kinds, group_detr=1)
    layers = [criterion(of_layer(outputs, layer), labels) for layer in range(LAYERS)]
    keys = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    theirs = {name: sum(part[key] for part in layers) for name, key in keys.items()}
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6)
    assert_same_gradients(sum(ours.values()), sum(theirs.values()), outputs)  # type: ignore[arg-type]


def test_matching_costs_equal_hugging_faces() -> None:
    config = SetCriterionConfig(class_loss="varifocal", quality_alpha=0.6, quality_gamma=1.0)
    outputs, labels = random_outputs(), random_labels()
    [ours] = assign([detection_problem("test", outputs, as_targets(labels), config)])
    matcher = rt_detr.RTDetrHungarianMatcher(their_config(config))
    for layer in range(LAYERS):
        for image, (rows, columns) in enumerate(matcher(of_layer(outputs, layer), labels)):
            assert ours.rows[layer, image, : COUNTS[image]].tolist() == rows.tolist()
            assert ours.columns[layer, image, : COUNTS[image]].tolist() == columns.tolist()


@pytest.mark.parametrize("class_loss", ["varifocal", "mal"])
def test_a_slow_loop_says_the_same(class_loss: Any) -> None:
    config = SetCriterionConfig(class_loss=class_loss)
    alpha, gamma = config.quality_parameters
    outputs, labels = random_outputs(), random_labels()
    targets = as_targets(labels)
    [found] = assign([detection_problem("test", outputs, targets, config)])
    total = 0.0
    logits, boxes = outputs.logits.double(), outputs.boxes_cxcywh.double()
    for layer in range(LAYERS):
        for image, count in enumerate(COUNTS):
            pairs = dict(
                zip(
                    found.rows[layer, image, :count].tolist(),
                    found.columns[layer, image, :count].tolist(),
                    strict=True,
                )
            )
            for query, scores in enumerate(logits[layer, image]):
                for label, z in enumerate(scores):
                    p = z.sigmoid().clamp(1e-12, 1 - 1e-12)
                    slot = pairs.get(query)
                    if slot is None or targets.labels[image, slot] != label:
                        total -= (alpha * p**gamma * (1 - p).log()).item()
                        continue
                    q = slow_iou(boxes[layer, image, query], targets.boxes_cxcywh[image, slot])
                    target, weight = (q, q) if class_loss == "varifocal" else (q**gamma, 1.0)
                    entropy = target * p.log() + (1 - target) * (1 - p).log()
                    total -= weight * entropy.item()
    ours = our_losses(outputs, targets, config)["class"].item()
    assert ours == pytest.approx(total / sum(COUNTS), rel=1e-5)


def slow_iou(first: Tensor, second: Tensor) -> float:
    (x, y, w, h), (u, v, a, b) = first.tolist(), second.tolist()
    across = max(0.0, min(x + w / 2, u + a / 2) - max(x - w / 2, u - a / 2))
    down = max(0.0, min(y + h / 2, v + b / 2) - max(y - h / 2, v - b / 2))
    return across * down / (w * h + a * b - across * down)


@pytest.mark.parametrize("class_loss", ["varifocal", "mal", "ia_bce"])
def test_the_order_of_objects_changes_nothing(class_loss: Any) -> None:
    config = SetCriterionConfig(class_loss=class_loss)
    outputs, labels = random_outputs(), random_labels((5, 5, 5, 5))
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = [{name: value[order] for name, value in entry.items()} for entry in labels]
    first, second = (our_losses(outputs, as_targets(x), config) for x in (labels, turned))
    for name, loss in first.items():
        torch.testing.assert_close(loss, second[name])


def test_no_gradient_reaches_boxes_through_the_class_loss() -> None:
    config = SetCriterionConfig(class_loss="varifocal")
    outputs, labels = random_outputs(), random_labels()
    loss = our_losses(outputs, as_targets(labels), config)["class"]
    [gradient] = torch.autograd.grad(loss, [outputs.boxes_cxcywh], allow_unused=True)
    assert gradient is None


def test_boxes_with_scores_are_for_the_focal_loss() -> None:
    config = SetCriterionConfig(class_loss="mal")
    outputs, targets = random_outputs(), as_targets(random_labels())
    scored = replace(targets, scores=torch.ones_like(targets.labels, dtype=torch.float32))
    with pytest.raises(AssertionError, match="cannot both be the class target"):
        our_losses(outputs, scored, config)
