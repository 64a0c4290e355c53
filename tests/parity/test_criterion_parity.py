"""The set criteria equal Hugging Face's on the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_detector_config
from torch import Tensor
from torch.nn.functional import pad

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.losses.set_criterion import detection_problem, set_losses
from d3etr.matching.assignment import assign
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

transformers = pytest.importorskip("transformers")
detr_loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
transformers_loss = pytest.importorskip("transformers.loss.loss_deformable_detr")

CLASSES, LAYERS, BATCH, QUERIES = 7, 3, 4, 25
COUNTS = (3, 0, 6, 1)


def random_outputs() -> DecoderOutputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, generator=generator) * 2
    boxes = torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator) * 0.5 + 0.1
    return DecoderOutputs(logits.requires_grad_(True), boxes.requires_grad_(True))


def random_labels(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        for count in counts
    ]


def as_targets(labels: list[dict[str, Tensor]]) -> Targets:
    counts = tuple(len(entry["boxes"]) for entry in labels)
    pairs = [(entry, max(counts) - n) for entry, n in zip(labels, counts, strict=True)]
    classes = torch.stack([pad(entry["class_labels"], (0, unused)) for entry, unused in pairs])
    boxes = torch.stack([pad(entry["boxes"], (0, 0, 0, unused)) for entry, unused in pairs])
    ids, sizes = tuple(range(len(counts))), ((64, 64),) * len(counts)
    return Targets(classes, boxes, counts, ids, sizes, torch.tensor(counts))


def test_every_layers_losses_and_gradients_equal_hugging_faces() -> None:
    config = SetCriterionConfig()
    outputs, labels = random_outputs(), random_labels()
    targets = as_targets(labels)
    (assignment,) = assign([detection_problem("test", outputs, targets, config)])
    ours = set_losses(outputs, targets, assignment, torch.tensor(float(sum(COUNTS))), config)
    total = sum(ours.values())
    ours_gradients = torch.autograd.grad(total, [outputs.logits, outputs.boxes_cxcywh])

    matcher = transformers_loss.DeformableDetrHungarianMatcher(
        class_cost=config.class_cost, bbox_cost=config.l1_cost, giou_cost=config.giou_cost
    )
    criterion = transformers_loss.DeformableDetrImageLoss(
        matcher, CLASSES, config.focal_alpha, ["labels", "boxes"]
    )
    layers = [
        {"logits": outputs.logits[layer], "pred_boxes": outputs.boxes_cxcywh[layer]}
        for layer in range(LAYERS)
    ]
    theirs = [criterion(layer, labels) for layer in layers]
    for name, key in (("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
        expected = sum(layer[key].item() for layer in theirs)
        assert ours[name].item() == pytest.approx(expected, rel=1e-5), name
    their_total = sum(sum(layer.values()) for layer in theirs)
    their_gradients = torch.autograd.grad(their_total, [outputs.logits, outputs.boxes_cxcywh])
    for mine, other in zip(ours_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def padded_images() -> ImageBatch:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(BATCH, 3, 64, 80, generator=generator)
    padding = torch.zeros(BATCH, 64, 80, dtype=torch.bool)
    padding[1, 40:], padding[2, :, 50:] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding)


def their_loss(
    student: DetectionTransformer,
    images: ImageBatch,
    labels: list[dict[str, Tensor]],
    eos: float,
) -> Tensor:
    """Of the logits, "no object" last, and boxes of every layer of a softmax DETR."""
    kept: dict[str, Any] = {}
    hook = student.class_head.register_forward_hook(lambda *parts: kept.update(raw=parts[2]))
    memory = student.encode(images)
    (outputs,) = student.decode(memory, [student.object_queries()])
    hook.remove()
    raw, boxes = kept["raw"], outputs.boxes_cxcywh
    config = transformers.DetrConfig(
        num_labels=raw.shape[-1] - 1,
        decoder_layers=len(raw),
        auxiliary_loss=True,
        eos_coefficient=eos,
    )
    loss: Tensor
    loss, *_ = detr_loss.ForObjectDetectionLoss(
        raw[-1], labels, raw.device, boxes[-1], config, raw, boxes
    )
    return loss


@pytest.mark.parametrize(
    ("counts", "queries", "unused", "eos"),
    [
        (COUNTS, QUERIES, 0, 0.1),
        (COUNTS, QUERIES, 3, 0.1),
        (COUNTS, 4, 0, 0.3),
        ((0, 0, 0, 0), QUERIES, 2, 0.1),
    ],
    ids=["objects", "unused-outputs", "more-objects-than-queries", "no-objects"],
)
def test_a_softmax_detr_learns_by_detrs_own_criterion(
    counts: tuple[int, ...], queries: int, unused: int, eos: float
) -> None:
    torch.manual_seed(0)
    kind = {"name": "detr", "classification": "softmax", "unused_outputs": unused}
    config = tiny_detector_config(width=32, queries=queries, decoder_layers=LAYERS, **kind)
    student = build_detector(config, CLASSES).train()
    for name, parameter in student.named_parameters():
        if "head" in name or "query" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    images, labels = padded_images(), random_labels(counts)
    targets = as_targets(labels)
    criterion = SetCriterionConfig(class_weight=1.0, class_cost=1.0, no_object_weight=eos)
    module = Distiller(student, None, MethodConfig.parse({}), criterion, seed=0)
    losses = module(images, targets, None, module.normalisers(targets, None))
    ours = torch.stack(list(losses.values())).sum()
    theirs = their_loss(student, images, labels, eos)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    parameters = list(student.parameters())
    gradients = [
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in (ours, theirs)
    ]
    largest = max(gradient.abs().max().item() for gradient in gradients[1])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * largest, rtol=1e-4)
