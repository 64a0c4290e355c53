"""DETR's set criterion on ground truth, all decoder layers at once.

Classification, L1 and generalised IoU over the Hungarian assignment (Carion et al. 2020, section
3.1). Of classes it is the focal loss of Conditional DETR, the varifocal one of RT-DETR, DEIM's
matchability-aware one, LW-DETR's IoU-aware cross entropy, or DETR's own where classes are
exclusive. Losses are weight-free sums over layers, divided by the number of objects; DETR's own
cross entropy by the weights of all queries instead.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from d3etr.config.training import SetCriterionConfig
from d3etr.matching.assignment import Assignment, CostBlock, gather_queries
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou, iou
from d3etr.matching.costs import detection_costs, focal_terms
from d3etr.matching.union import SharedPairs
from d3etr.structures import DecoderOutputs, Targets

LOWEST_TARGET = 0.01
"""Of a matched query's class with ``ia_bce``, as in LW-DETR's code."""


def detection_problem(
    name: str, outputs: DecoderOutputs, targets: Targets, config: SetCriterionConfig
) -> CostBlock:
    """The assignment problems of queries against the objects of their image."""
    return CostBlock(
        name, detection_costs(outputs, targets, config), targets.counts, targets.num_objects
    )


def _matched_labels(targets: Targets, assignment: Assignment) -> Tensor:
    """[L, B, P] class of the object that each pair's query is matched with."""
    labels = targets.labels[None].expand(assignment.columns.shape[0], -1, -1)
    return labels.gather(2, assignment.columns)


def _matched_scores(targets: Targets, assignment: Assignment) -> Tensor | None:
    """[L, B, P] score of each pair's box; None where objects have none."""
    if targets.scores is None:
        return None
    scores = targets.scores[None].expand(assignment.columns.shape[0], -1, -1)
    return scores.gather(2, assignment.columns)


def query_weights(targets: Targets, queries: int, config: SetCriterionConfig) -> Tensor:
    """Scalar: weights of all images' queries in the cross entropy of one layer, summed.

    Args:
        targets: ground truth; of each image, as many objects as there are queries are matched.
        queries: N.
        config: uses ``no_object_weight``.
    """
    matched = targets.num_objects.clamp(max=queries).sum().float()
    return matched + config.no_object_weight * (len(targets.counts) * queries - matched)


def _matched_logits(logits: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
    """[L, B, P] logits of the queries of each pair, of the class of their object."""
    labels = _matched_labels(targets, assignment)
    return gather_queries(logits, assignment.rows).gather(3, labels[..., None])[..., 0]


def _focal_loss(
    outputs: DecoderOutputs, targets: Targets, assignment: Assignment, config: SetCriterionConfig
) -> Tensor:
    """Sum of the focal loss: all logits as negatives, then matched ones turned positive.

    No one-hot target of [L, B, N, C] is built.
    """
    logits = outputs.logits.float()
    _, negative = focal_terms(logits, config.focal_alpha, config.focal_gamma)
    matched = _matched_logits(logits, targets, assignment)
    as_positive, as_negative = focal_terms(matched, config.focal_alpha, config.focal_gamma)
    scores = _matched_scores(targets, assignment)
    if scores is not None:  # Li et al. 2020, equation 4; equal to the above where a score is 1
        entropy = binary_cross_entropy_with_logits(matched, scores, reduction="none")
        distance = (scores - matched.sigmoid()).abs()
        as_positive = config.focal_alpha * distance**config.focal_gamma * entropy
    return negative.sum() + ((as_positive - as_negative) * assignment.valid_mask).sum()


def _quality_loss(
    outputs: DecoderOutputs,
    targets: Targets,
    assignment: Assignment,
    config: SetCriterionConfig,
    overlap: Tensor,
) -> Tensor:
    """Sum of a loss whose class target is how well the matched box fits.

    varifocal (Zhang et al. 2021, arXiv 2008.13367, equation 2): q BCE(z, q) with the IoU q. mal
    (Huang et al. 2024, arXiv 2412.04234): BCE(z, q^gamma). Both: alpha p^gamma BCE(z, 0) of all
    other classes and queries. As in RT-DETR's and DEIM's code, weights and targets are outside the
    graph. ia_bce (Chen et al. 2024, arXiv 2406.03459, equation 1): BCE(z, t), t = p^alpha
    q^(1 - alpha) outside the graph and at least 0.01, and p^gamma BCE(z, 0), whose weight is in the
    graph, as in LW-DETR's code. Built as the focal loss is, without a one-hot target.

    Args:
        outputs: of the groups.
        targets: ground truth.
        assignment: queries to objects.
        config: uses ``class_loss`` and its parameters.
        overlap: [L, B, P] IoU of each pair's boxes.
    """
    alpha, gamma = config.quality_parameters
    logits, overlap = outputs.logits.float(), overlap.detach()
    matched = _matched_logits(logits, targets, assignment)

    def as_negative(z: Tensor) -> Tensor:
        if config.class_loss == "ia_bce":
            return z.sigmoid() ** gamma * softplus(z)
        return alpha * z.detach().sigmoid() ** gamma * softplus(z)

    if config.class_loss == "varifocal":
        entropy = binary_cross_entropy_with_logits(matched, overlap, reduction="none")
        as_positive = overlap * entropy
    elif config.class_loss == "ia_bce":
        target = matched.detach().sigmoid() ** alpha * overlap ** (1 - alpha)
        target = target.clamp(min=LOWEST_TARGET)
        as_positive = binary_cross_entropy_with_logits(matched, target, reduction="none")
    else:
        as_positive = binary_cross_entropy_with_logits(matched, overlap**gamma, reduction="none")
    own = as_positive - as_negative(matched)
    return as_negative(logits).sum() + (own * assignment.valid_mask).sum()


def _cross_entropy(
    outputs: DecoderOutputs, targets: Targets, assignment: Assignment, weight: float
) -> Tensor:
    """Sum of -log p: of "no object", times its weight, and of matched queries' classes instead."""
    assert outputs.no_object is not None, "only a detector's own outputs are trained"
    matched = _matched_logits(outputs.logits.float(), targets, assignment)
    instead = gather_queries(outputs.no_object[..., None], assignment.rows)[..., 0]
    own = softplus(-matched) + weight * instead
    return (own * assignment.valid_mask).sum() - weight * outputs.no_object.sum()


def _paired_boxes(
    outputs: DecoderOutputs, targets: Targets, assignment: Assignment
) -> tuple[Tensor, Tensor]:
    """[L, B, P, 4] cxcywh twice: of each pair's query and object."""
    boxes = gather_queries(outputs.boxes_cxcywh.float(), assignment.rows)
    layers = assignment.rows.shape[0]
    truth = gather_queries(
        targets.boxes_cxcywh[None].expand(layers, -1, -1, -1), assignment.columns
    )
    return boxes, truth


def set_losses(
    outputs: DecoderOutputs,
    targets: Targets,
    assignment: Assignment,
    objects: Tensor,
    config: SetCriterionConfig,
    weights: Tensor | None = None,
    shared: SharedPairs | None = None,
) -> dict[str, Tensor]:
    """Classification, L1 and GIoU losses of all layers.

    A detector's boxes, which have scores, go with the focal loss only.

    Args:
        outputs: decoder outputs, [L, B, N, ...].
        targets: ground truth, padded to T objects; or a detector's boxes, whose scores are class
            targets and the weights of the other terms (not where classes are exclusive).
        assignment: queries (rows) to objects (columns) of each layer and image.
        objects: scalar, the number of objects (or the sum of scores) in the global batch.
        config: parameters of the class loss; weights of terms are applied by the caller.
        weights: scalar, ``query_weights`` of the global batch; needed where classes are exclusive.
        shared: pairs that L1 and GIoU are over in place of the assignment's; of each image as many
            count as that has.

    Returns:
        Scalars ``class``, ``l1`` and ``giou``.
    """
    count = objects.clamp(min=1)
    boxes, truth = _paired_boxes(outputs, targets, assignment)
    corners, true_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)
    if outputs.softmax_classes:
        assert weights is not None, "the cross entropy is divided by the weights of all queries"
        entropy = _cross_entropy(outputs, targets, assignment, config.no_object_weight)
        losses = {"class": entropy / weights}
    elif config.class_loss == "focal":
        losses = {"class": _focal_loss(outputs, targets, assignment, config) / count}
    else:
        assert targets.scores is None, "a score and an IoU cannot both be the class target"
        overlap = iou(corners.detach(), true_corners)
        quality = _quality_loss(outputs, targets, assignment, config, overlap)
        losses = {"class": quality / count}
    scores, counted = _matched_scores(targets, assignment), assignment.valid_mask
    if scores is not None:
        counted = counted * scores
    if shared is not None:
        assert scores is None, "shared pairs are for ground truth"
        boxes, truth = _paired_boxes(outputs, targets, shared.of_layers(outputs.layers))
        corners, true_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)
        counted = shared.weights
    losses["l1"] = ((boxes - truth).abs() * counted[..., None]).sum() / count
    losses["giou"] = ((1 - generalised_iou(corners, true_corners)) * counted).sum() / count
    return losses
