"""Detectors of today find squares of two colours after a few seconds of training from nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILY, tiny_detector_config
from torchvision.ops import box_convert, box_iou

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

SIDE, IMAGES, STEPS = 48, 8, 150


def squares(seed: int) -> tuple[ImageBatch, Targets]:
    """Images of one red or green square each on noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.3 * torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(2, (IMAGES, 1), generator=generator)
    boxes = torch.zeros(IMAGES, 1, 4)
    for image in range(IMAGES):
        side = int(torch.randint(12, 24, (), generator=generator))
        left, top = torch.randint(0, SIDE - side, (2,), generator=generator).tolist()
        pixels[image, int(labels[image]), top : top + side, left : left + side] += 2.0
        corner = torch.tensor([left + side / 2, top + side / 2, side, side])
        boxes[image, 0] = corner / SIDE
    counts, sizes = (1,) * IMAGES, ((SIDE, SIDE),) * IMAGES
    ids = tuple(range(seed * IMAGES, (seed + 1) * IMAGES))
    return ImageBatch(pixels), Targets(labels, boxes, counts, ids, sizes, torch.ones(IMAGES).long())


LONGER = {"dino": 300, "lw_detr": 300}
"""Slower kinds: after 150 steps DINO's boxes fit, but its scores are 0.24 to 0.31; LW-DETR's boxes
overlap by 0.59 on some processors."""
KINDS = ("rt_detr", "d_fine", "deimv2", "deimv2-lite", "lw_detr", "rf_detr", "dino")


@pytest.mark.parametrize("kind", KINDS)
def test_squares_are_found(kind: str) -> None:
    torch.manual_seed(0)
    config = tiny_detector_config(**{"width": 32, "heads": 4, **FAMILY[kind]})
    student = build_detector(config, 2).train()
    defaults = student.config.criterion_defaults
    criterion = SetCriterionConfig.model_validate({**defaults})
    module = Distiller(student, None, MethodConfig.parse({}), criterion, seed=0)
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-3)
    steps = LONGER.get(kind, STEPS)
    for step in range(steps):
        images, targets = squares(step)
        losses = module(images, targets, None, module.normalisers(targets, None), step=step)
        torch.stack([*losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    student.eval()
    images, targets = squares(steps)  # never seen
    with torch.no_grad():
        memory = student.encode(images)
        [outputs] = student.decode(memory, [student.object_queries(memory)])
    scores, best = outputs.logits[-1].flatten(1).max(1)
    query, label = best // 2, best % 2
    found = outputs.boxes_cxcywh[-1][torch.arange(IMAGES), query]
    corners = [box_convert(x, "cxcywh", "xyxy") for x in (found, targets.boxes_cxcywh[:, 0])]
    overlap = box_iou(*corners).diagonal()
    assert (label == targets.labels[:, 0]).float().mean() >= 0.75, (label, targets.labels)
    assert overlap.median() > 0.6, overlap
    assert scores.sigmoid().median() > 0.3, scores
