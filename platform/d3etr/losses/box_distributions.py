"""What distributions over edges learn: D-FINE's local losses (Peng et al., arXiv 2410.13842).

Fine-grained localisation (FGL, section 4.1, equation 6): the two bins around where an object's edge
is, each the more the nearer it is, weighted by the IoU. Decoupled distillation focal loss (DDF,
section 4.2, equations 7 and 8): the last layer's distributions teach those of the layers before it,
matched queries apart from all others. Method ``distribution`` uses both over a teacher's boxes.
Where paper and official code differ, it is the code's.

Shapes: L decoder layers · B images · N queries · P slots of pairs · K bins · .. any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from d3etr.edge_distributions import BoxDistributions
from d3etr.matching.assignment import Assignment, gather_queries
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.matching.edges import edge_moves
from d3etr.structures import DecoderOutputs, Targets

TEMPERATURE = 5.0
"""Of teacher and student in DDF, as in the official code."""
EDGES = 4


@dataclass(frozen=True)
class QueryCounts:
    """Queries of the global batch that DDF's two means are over, and how they are weighed.

    Each is a scalar or [B], as seen from each image.

    Attributes:
        matched: queries with an object.
        others: queries without one.
        share: weight of the mean over matched queries; that over others has the rest of 1.
    """

    matched: Tensor
    others: Tensor
    share: Tensor

    @classmethod
    def balanced(cls, matched: Tensor, others: Tensor) -> QueryCounts:
        """The share by square roots of both numbers, as official."""
        share = matched.sqrt() / (matched.sqrt() + others.sqrt()).clamp(min=1)
        return cls(matched, others, share)


def neighbouring_bins(moves: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Left bin [..] int64 in [0, K - 1) around each distance, and the share [..] of the next one.

    Beyond the outermost bins it is all of those.

    Args:
        moves: [..] distances.
        distances: [K] of the bins, rising.
    """
    left = torch.searchsorted(distances, moves.contiguous(), right=True) - 1
    left = left.clamp(0, len(distances) - 2)
    low, high = distances[left], distances[left + 1]
    return left, ((moves - low) / (high - low)).clamp(0, 1)


def localisation_terms(corners: Tensor, moves: Tensor, distances: Tensor) -> Tensor:
    """[..] cross entropy of each edge with its two bins.

    Args:
        corners: [.., K] logits.
        moves: [..] where the edges should be, outside the graph.
        distances: [K] of the bins.
    """
    left, share = neighbouring_bins(moves, distances)
    around = torch.stack([left, left + 1], -1)
    lower, upper = corners.log_softmax(-1).gather(-1, around).unbind(-1)
    return -((1 - share) * lower + share * upper)


def distillation_terms(
    corners: Tensor, teacher: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """[..] T^2 KL(teacher || corners) of each edge at the temperature T.

    Args:
        corners: [.., K] logits.
        teacher: [.., K] logits, which may be broadcast; no gradient passes through them.
        temperature: T.
    """
    target = (teacher.detach() / temperature).log_softmax(-1).expand_as(corners)
    found = (corners / temperature).log_softmax(-1)
    divergence = kl_div(found, target, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def edge_loss(
    distributions: BoxDistributions, queries: Tensor | None, boxes: Tensor, weights: Tensor
) -> Tensor:
    """Cross entropy with the two bins around where edges should be, summed over all.

    Args:
        distributions: of L layers and N queries.
        queries: [L, B, P] whose edges; None: all, in order.
        boxes: [L, B, P, 4] cxcywh, where their edges should be.
        weights: [L, B, P] of each query.
    """
    corners = distributions.corners.float()
    start = distributions.start.expand(len(corners), -1, -1, -1)
    if queries is not None:
        start = gather_queries(start, queries)
        found = gather_queries(corners.flatten(3), queries)
        corners = found.reshape(*found.shape[:3], *corners.shape[3:])
    moves = edge_moves(start, cxcywh_to_xyxy(boxes), distributions.curvature)
    terms = localisation_terms(corners, moves, distributions.distances)
    return (terms.sum(-1) * weights).sum()


def pair_overlaps(outputs: DecoderOutputs, targets: Targets, assignment: Assignment) -> Tensor:
    """[L, B, P] IoU of each pair's boxes, outside the graph."""
    boxes = gather_queries(outputs.boxes_cxcywh.detach().float(), assignment.rows)
    return iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(_true_boxes(targets, assignment)))


def fine_grained_loss(
    outputs: DecoderOutputs,
    targets: Targets,
    assignment: Assignment,
    counted: Tensor,
    objects: Tensor,
) -> Tensor:
    """FGL, summed over layers, pairs and edges.

    Args:
        outputs: with distributions, [L, B, N, ..].
        targets: ground truth.
        assignment: queries (rows) to objects (columns), of as many layers.
        counted: [B, P] weight of each pair, 0 in unused slots.
        objects: scalar, what it is divided by: pairs of one layer in the global batch.
    """
    own = outputs.distributions
    assert own is not None
    weights = pair_overlaps(outputs, targets, assignment) * counted
    loss = edge_loss(own, assignment.rows, _true_boxes(targets, assignment), weights)
    return loss / objects.clamp(min=1)


def self_distillation_loss(
    outputs: DecoderOutputs, targets: Targets, assignment: Assignment, counts: QueryCounts
) -> Tensor:
    """DDF, summed over the layers before the last.

    A matched query's weight is the IoU of its box in the layer that learns, any other's the last
    layer's confidence.

    Args:
        outputs: with distributions, [L, B, N, ..].
        targets: ground truth.
        assignment: queries to objects, of as many layers.
        counts: of the global batch.
    """
    own = outputs.distributions
    assert own is not None
    taught = slice(0, outputs.layers - 1)
    overlaps = pair_overlaps(outputs, targets, assignment)[taught]
    rows = assignment.rows[taught]
    confidence = outputs.logits[-1].detach().float().amax(-1).sigmoid().expand(len(rows), -1, -1)
    corners = own.corners.float()
    terms = distillation_terms(corners[taught], corners[-1])
    return balanced_sum(terms, rows, assignment.valid_mask, overlaps, confidence, counts)


def balanced_sum(
    terms: Tensor,
    rows: Tensor,
    used: Tensor,
    overlaps: Tensor,
    confidence: Tensor,
    counts: QueryCounts,
) -> Tensor:
    """DDF's sum: means over matched queries and over all others, weighed against each other.

    Args:
        terms: [L, B, N, 4] of each edge.
        rows: [L, B, P] queries that are matched with objects.
        used: [B, P] bool, which of these slots are in use.
        overlaps: [L, B, P] weights of matched queries.
        confidence: [L, B, N] weights of the others.
        counts: of the global batch.
    """
    # Unused slots go to a column of their own.
    rows = rows.where(used, terms.shape[2])
    weights = pad(confidence, (0, 1))
    matched = torch.zeros_like(weights).scatter(2, rows, 1.0)[..., :-1]
    weights = weights.scatter(2, rows, overlaps)[..., :-1]
    weighed = terms.sum(-1) * weights / EDGES
    of_matched = (weighed * matched).sum((0, 2)) / counts.matched.clamp(min=1)
    of_others = (weighed * (1 - matched)).sum((0, 2)) / counts.others.clamp(min=1)
    return (counts.share * of_matched + (1 - counts.share) * of_others).sum()


def _true_boxes(targets: Targets, assignment: Assignment) -> Tensor:
    """[L, B, P, 4] cxcywh of the objects."""
    boxes = targets.boxes_cxcywh.float()
    return gather_queries(boxes.expand(len(assignment.rows), -1, -1, -1), assignment.columns)
