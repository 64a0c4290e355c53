"""TPRD's step: a teacher's layer takes from earlier ones what they got better.

The step is that of the authors' code (github.com/xingyitong1/TPRD), which puts it before five
methods; their class loss, which goes with it there, is not here. Where a student has fewer layers
than its teacher, the earlier layers are those that the student learns from (our choice).

Shapes: L decoder layers · B images · M teacher queries · C classes · T objects · P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d3etr.config.detector import DetectorConfig
from d3etr.errors import UserError
from d3etr.matching.assignment import Assignment, gather_queries, matched_objects
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.structures import DecoderOutputs, Targets, constant


class TeacherRefinement:
    """Refines the outputs of the teacher's own queries.

    Args:
        layers: the teacher's layer for each of the student's.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._earlier = tuple(float(other < layer) for layer in layers for other in layers)

    def __call__(
        self, outputs: DecoderOutputs, targets: Targets, assignment: Assignment
    ) -> DecoderOutputs:
        """The refined outputs; attention maps stay.

        Args:
            outputs: one layer for each of the student's.
            targets: ground truth; nothing changes in images that have no objects.
            assignment: of the outputs' queries (rows) to objects (columns), in each layer.
        """
        if not targets.labels.shape[1]:
            return outputs
        logits, boxes = outputs.logits, outputs.boxes_cxcywh
        objects = matched_objects(assignment, outputs.queries)
        labels, better, found = self._better(logits, boxes, objects, targets)
        best = _from_layers(logits, better).gather(3, labels[..., None])[..., 0]
        highest, classes = logits.max(-1)
        lowest = self._lowest(highest, classes)
        others = (objects < 0) & (targets.num_objects > 0)[:, None]
        written = torch.where(found, best, torch.where(others, lowest, highest))
        where = torch.where(found, labels, classes)
        return replace(
            outputs,
            logits=logits.scatter(3, where[..., None], written[..., None]),
            boxes_cxcywh=torch.where(found[..., None], _from_layers(boxes, better), boxes),
        )

    def _better(
        self, logits: Tensor, boxes: Tensor, objects: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For matched queries: their object's class, the best earlier layer, whether there is one.

        All [L, B, M]; a dimension of other layers, second, is in between.
        """
        known = objects.clamp(min=0)
        layers = len(objects)
        labels = targets.labels[None].expand(layers, -1, -1).gather(2, known)
        truth = gather_queries(targets.boxes_cxcywh[None].expand(layers, -1, -1, -1), known)
        at = labels[:, None, ..., None].expand(-1, layers, -1, -1, -1)
        scores = logits[None].expand(layers, -1, -1, -1, -1).gather(4, at)[..., 0]
        overlap = iou(cxcywh_to_xyxy(boxes.float())[None], cxcywh_to_xyxy(truth.float())[:, None])
        better = self._mask(logits) & (overlap > _own(overlap)) & (scores > _own(scores))
        better &= (objects >= 0)[:, None]
        return labels, overlap.where(better, -1.0).argmax(1), better.any(1)

    def _lowest(self, highest: Tensor, classes: Tensor) -> Tensor:
        """[L, B, M] the lowest of a query's highest scores in this and earlier layers.

        Of layers in which the same class has it.
        """
        same = self._mask(highest) & (classes[None] == classes[:, None])
        return torch.minimum(highest[None].where(same, torch.inf).amin(1), highest)

    def _mask(self, like: Tensor) -> Tensor:
        """[L, L, 1, 1] whether the second layer comes before the first."""
        size = len(like)
        return constant(self._earlier, torch.float32, like.device).view(size, size, 1, 1) > 0


def _own(values: Tensor) -> Tensor:
    """Of [L, L, B, M], each layer's value of itself: [L, 1, B, M]."""
    return values.diagonal(dim1=0, dim2=1).movedim(-1, 0)[:, None]


def _from_layers(values: Tensor, layers: Tensor) -> Tensor:
    """Each query's values [L, B, M, X] of the layer [L, B, M] that is named for it."""
    return values.gather(0, layers[..., None].expand(-1, -1, -1, values.shape[-1]))


def check_refinement(layers: Sequence[int], teacher: DetectorConfig) -> None:
    """Refuse ``refine_teacher`` where it would change nothing, or break a distribution.

    Args:
        layers: the teacher's layer for each of the student's.
        teacher: its architecture.

    Raises:
        UserError: names what would help.
    """
    if len({*layers}) == 1:
        raise UserError(
            "distillation.refine_teacher takes from the teacher's earlier layers, but the "
            f"student's {len(layers)} all learn from one: set distillation.layer_map to 'uniform', "
            "give the student more than one decoder layer, or set refine_teacher to false"
        )
    if teacher.softmax_classes:
        raise UserError(
            "distillation.refine_teacher replaces the score of one class by itself, but the "
            f"teacher's ({teacher.name}) come from one softmax over all: set it to false, or take "
            "a teacher with sigmoid classification"
        )
