"""Distillation of predictions: class logits and boxes of corresponding queries.

The terms are D3ETR's (predictions of matched queries); their form is our choice, the paper's is
not known: a focal-weighted soft-target BCE over every pair, L1 and GIoU weighted by the teacher's
confidence, added over layers unless configured otherwise.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

from d3etr.config.distillation import PredictionConfig
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou


def class_loss(logits: Tensor, teacher: Tensor, config: PredictionConfig) -> Tensor:
    """The configured class loss of each pair, summed over classes.

    ``bce``: BCE(z, p') with soft targets, whose minimum is the teacher's entropy. ``focal``:
    |p' - p|^2 BCE(z, p'), 0 where student and teacher agree (Li et al. 2020, quality focal loss,
    beta = 2). ``kl``: T^2 KL(softmax(z' / T) || softmax(z / T)), Hinton et al. 2015.

    Args:
        logits: [..., C] student.
        teacher: [..., C] teacher logits.
        config: names the loss, and the temperature T; larger is softer.

    Returns:
        [...].
    """
    if config.class_loss == "kl":
        temperature = config.temperature
        target = log_softmax(teacher / temperature, -1)
        student = log_softmax(logits / temperature, -1)
        return temperature**2 * kl_div(student, target, reduction="none", log_target=True).sum(-1)
    target = teacher.sigmoid()
    entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
    if config.class_loss == "focal":
        entropy = (target - logits.sigmoid()).square() * entropy
    return entropy.sum(-1)


def prediction_losses(
    logits: Tensor,
    boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    class_weights: Tensor,
    weights: Tensor,
    config: PredictionConfig,
) -> dict[str, Tensor]:
    """Weighted sums of class, L1 and GIoU losses over images and pairs; sum or mean over layers.

    Args:
        logits: [L, B, P, C] student.
        boxes: [L, B, P, 4] student, cxcywh.
        teacher_logits: [L, B, P, C].
        teacher_boxes: [L, B, P, 4] cxcywh.
        class_weights: [L, B, P] weight of each pair's class loss, already normalised.
        weights: [L, B, P] the same of its box losses.
        config: form of the class loss, which terms are on, and what is made of the layers.

    Returns:
        Scalars ``class``, ``l1``, ``giou``; terms of weight 0 are left out.
    """
    losses = {}
    if config.class_weight:
        pairs = class_loss(logits, teacher_logits, config)
        losses["class"] = config.class_weight * (pairs * class_weights).sum()
    if config.l1_weight:
        distance = (boxes - teacher_boxes).abs().sum(-1)
        losses["l1"] = config.l1_weight * (distance * weights).sum()
    if config.giou_weight:
        overlap = generalised_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(teacher_boxes))
        losses["giou"] = config.giou_weight * ((1 - overlap) * weights).sum()
    if config.layers == "mean":
        return {name: loss / len(logits) for name, loss in losses.items()}
    return losses
