"""DETR's set criterion on ground truth, all decoder layers at once.

Focal classification, L1 and generalised IoU over the Hungarian assignment (Carion et al. 2020,
section 3.1, with the focal loss of Conditional DETR). Losses are weight-free sums over layers,
divided by the number of objects.
"""

from __future__ import annotations

from torch import Tensor

from d3etr.config.training import SetCriterionConfig
from d3etr.matching.assignment import Assignment, CostBlock, gather_queries
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou
from d3etr.matching.costs import detection_costs, focal_terms
from d3etr.structures import DecoderOutputs, Targets


def detection_problem(
    name: str, outputs: DecoderOutputs, targets: Targets, config: SetCriterionConfig
) -> CostBlock:
    """The assignment problems of queries against the objects of their image."""
    return CostBlock(
        name, detection_costs(outputs, targets, config), targets.counts, targets.objects
    )


def _matched_labels(targets: Targets, assignment: Assignment) -> Tensor:
    """[L, B, P] class of the object that each pair's query is matched with."""
    labels = targets.labels[None].expand(assignment.columns.shape[0], -1, -1)
    return labels.gather(2, assignment.columns)


def _class_loss(
    logits: Tensor, labels: Tensor, assignment: Assignment, config: SetCriterionConfig
) -> Tensor:
    """Sum of the focal loss: all logits as negatives, then matched ones turned positive.

    No one-hot target of [L, B, N, C] is built.
    """
    _, negative = focal_terms(logits, config.focal_alpha, config.focal_gamma)
    matched = gather_queries(logits, assignment.rows).gather(3, labels[..., None])[..., 0]
    as_positive, as_negative = focal_terms(matched, config.focal_alpha, config.focal_gamma)
    return negative.sum() + ((as_positive - as_negative) * assignment.used).sum()


def set_losses(
    outputs: DecoderOutputs,
    targets: Targets,
    assignment: Assignment,
    objects: Tensor,
    config: SetCriterionConfig,
) -> dict[str, Tensor]:
    """Classification, L1 and GIoU losses of all layers.

    Args:
        outputs: decoder outputs, [L, B, N, ...].
        targets: ground truth, padded to T objects.
        assignment: queries (rows) to objects (columns) of each layer and image.
        objects: scalar, the number of objects in the global batch.
        config: focal parameters; weights are applied by the caller.

    Returns:
        Scalars ``class``, ``l1`` and ``giou``.
    """
    count = objects.clamp(min=1)
    losses = {
        "class": _class_loss(
            outputs.logits.float(), _matched_labels(targets, assignment), assignment, config
        )
    }
    boxes = gather_queries(outputs.boxes_cxcywh.float(), assignment.rows)
    layers = assignment.rows.shape[0]
    truth = gather_queries(
        targets.boxes_cxcywh[None].expand(layers, -1, -1, -1), assignment.columns
    )
    losses["l1"] = ((boxes - truth).abs() * assignment.used[..., None]).sum()
    overlap = generalised_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    losses["giou"] = ((1 - overlap) * assignment.used).sum()
    return {name: loss / count for name, loss in losses.items()}
