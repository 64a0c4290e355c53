"""The set criterion equals Hugging Face's on the same outputs."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.criterion import detection_problem, set_losses
from d3etr.matching.assignment import assign
from d3etr.structures import DecoderOutputs, Targets

transformers_loss = pytest.importorskip("transformers.loss.loss_deformable_detr")

CLASSES, LAYERS, BATCH, QUERIES = 7, 3, 4, 25
COUNTS = (3, 0, 6, 1)


def random_outputs() -> DecoderOutputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES, generator=generator) * 2
    boxes = torch.rand(LAYERS, BATCH, QUERIES, 4, generator=generator) * 0.5 + 0.1
    return DecoderOutputs(logits.requires_grad_(True), boxes.requires_grad_(True))


def random_labels() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        for count in COUNTS
    ]


def as_targets(labels: list[dict[str, Tensor]]) -> Targets:
    most = max(COUNTS)
    classes = torch.stack(
        [pad(entry["class_labels"], (0, most - n)) for entry, n in zip(labels, COUNTS, strict=True)]
    )
    boxes = torch.stack(
        [pad(entry["boxes"], (0, 0, 0, most - n)) for entry, n in zip(labels, COUNTS, strict=True)]
    )
    return Targets(
        classes, boxes, COUNTS, tuple(range(BATCH)), ((64, 64),) * BATCH, torch.tensor(COUNTS)
    )


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
