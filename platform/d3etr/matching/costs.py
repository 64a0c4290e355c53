"""Costs of pairing queries with objects or with other queries.

Shapes: L decoder layers · B images · N queries · M other queries · T objects · C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from d3etr.config.distillation import MatchingCostConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.kernels.availability import runs_kernels
from d3etr.matching.boxes import coordinates, cxcywh_to_xyxy, pairwise_generalised_iou
from d3etr.structures import DecoderOutputs, Targets


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss of each logit as a positive and as a negative (Lin et al. 2017, equation 5).

    Args:
        logits: any shape.
        alpha: weight of positives; negatives weigh 1 - alpha.
        gamma: focusing exponent.

    Returns:
        Two tensors of the shape of ``logits``.
    """
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** gamma * softplus(-logits)
    negative = (1 - alpha) * probability**gamma * softplus(logits)
    return positive, negative


def box_costs(first: Tensor, second: Tensor, l1: float, giou: float) -> Tensor:
    """l1 * |b - b'|_1 + giou * (1 - GIoU) of every pair.

    Args:
        first: [..., N, 4] cxcywh.
        second: [..., M, 4] cxcywh.
        l1: weight of the L1 distance.
        giou: weight of the generalised IoU.

    Returns:
        [..., N, M].
    """
    # Coordinate by coordinate on [.., N, M]: no [.., N, M, 4] tensor.
    pairs = zip(coordinates(first), coordinates(second), strict=True)
    distance = sum((one[..., :, None] - other[..., None, :]).abs() for one, other in pairs)
    overlap = pairwise_generalised_iou(cxcywh_to_xyxy(first), cxcywh_to_xyxy(second))
    return l1 * distance + giou * (1 - overlap)


@torch.no_grad()
def detection_costs(
    outputs: DecoderOutputs, targets: Targets, config: SetCriterionConfig
) -> Tensor:
    """Hungarian matching cost of queries against ground truth.

    Of classes: Conditional DETR's focal cost, or where classes are exclusive DETR's, minus the
    probability. Only the logits of classes that occur in an image are looked at.

    Returns:
        [L, B, N, T]; columns beyond an image's object count are meaningless.
    """
    layers, batch, queries, _ = outputs.logits.shape
    labels = targets.labels[None, :, None].expand(layers, batch, queries, -1)
    logits = outputs.logits.float().gather(-1, labels)
    if outputs.softmax_classes:
        cost = -logits.sigmoid()
    else:
        positive, negative = focal_terms(logits, config.focal_alpha, config.focal_gamma)
        cost = positive - negative
    boxes = box_costs(
        outputs.boxes_cxcywh.float(), targets.boxes_cxcywh[None], config.l1_cost, config.giou_cost
    )
    return config.class_cost * cost + boxes


@torch.no_grad()
def distillation_costs(
    student: DecoderOutputs, teacher: DecoderOutputs, config: MatchingCostConfig
) -> Tensor:
    """Adaptive Matching's cost of student queries against teacher queries, per layer.

    c_cls d_cls(z_i, z'_j) + c_l1 |b_i - b'_j|_1 + c_giou (1 - GIoU). That a bipartite matching
    of minimal cost runs in each decoder layer is D3ETR's; the cost's form is our choice (the
    paper's is not known).

    Args:
        student: outputs of N queries.
        teacher: outputs of M queries in as many layers.
        config: weights and the class distance.

    Returns:
        [L, B, N, M].
    """
    if config.class_distance == "l2" and runs_kernels(student.logits.device):
        from d3etr.kernels.pair_costs import pair_costs

        return pair_costs(
            student.boxes_cxcywh,
            student.logits.float(),
            teacher.boxes_cxcywh,
            teacher.logits.float(),
            class_cost=config.class_cost,
            l1_cost=config.l1_cost,
            giou_cost=config.giou_cost,
        )
    cost = box_costs(
        student.boxes_cxcywh.float(), teacher.boxes_cxcywh.float(), config.l1_cost, config.giou_cost
    )
    if not config.class_cost:
        return cost
    logits, target = student.logits.float(), teacher.logits.float().sigmoid()
    if config.class_distance == "l2":
        distance = torch.cdist(logits.sigmoid(), target)
    else:  # sum over classes of BCE(z, sigma(z')) = softplus(z) - z sigma(z'), as a product
        distance = softplus(logits).sum(-1, keepdim=True) - logits @ target.transpose(-1, -2)
    return cost + config.class_cost * distance
