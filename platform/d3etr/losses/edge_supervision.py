"""What groups whose boxes are distributions learn from ground truth beyond the set criterion.

The first layer's outputs before refinement, the local losses, and what they are divided by
(D-FINE, arXiv 2410.13842; the official code's criterion).

Shapes: L decoder layers · B images · N queries · P slots of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from d3etr.config.training import SetCriterionConfig
from d3etr.losses.box_distributions import (
    QueryCounts,
    fine_grained_loss,
    self_distillation_loss,
)
from d3etr.matching.assignment import Assignment
from d3etr.matching.union import SharedPairs
from d3etr.structures import DecoderOutputs, Targets

_MATCHED = "matched/"
"""Normalisers by group: its queries that have an object in one layer."""


def with_first_outputs(outputs: DecoderOutputs) -> DecoderOutputs:
    """What the first layer says before refinement as one more layer, the last; without edges.

    Outputs without distributions are returned as they are.
    """
    own = outputs.distributions
    if own is None:
        return outputs
    return DecoderOutputs(
        torch.cat([outputs.logits, own.first_logits[None]]),
        torch.cat([outputs.boxes_cxcywh, own.first_boxes[None]]),
    )


def for_layers(assignment: Assignment, layers: int) -> Assignment:
    """An assignment of as many layers; one more than it has is matched as the first is.

    That is our choice for groups that a teacher's outputs are matched for.
    """
    rows, columns = assignment.rows, assignment.columns
    if len(rows) < layers:
        rows, columns = (torch.cat([x, x[:1]]) for x in (rows, columns))
    return replace(assignment, rows=rows[:layers], columns=columns[:layers])


def match_normalisers(sizes: Mapping[str, int], targets: Targets) -> dict[str, Tensor]:
    """What DDF is divided by, by group: queries of a layer that are matched.

    Args:
        sizes: queries of each group.
        targets: ground truth of a micro-batch, of images with labels.
    """
    objects = targets.num_objects
    return {f"{_MATCHED}{name}": objects.clamp(max=n).sum().float() for name, n in sizes.items()}


def query_counts(
    name: str,
    queries: int,
    assignment: Assignment,
    shared: SharedPairs | None,
    normalisers: Mapping[str, Tensor],
    main: QueryCounts | None = None,
) -> QueryCounts:
    """Matched and other queries of a group in the global batch.

    Both are known before the forward pass where each layer is matched on its own, so losses do not
    depend on how the batch is cut. How many shared pairs there will be is not: each image reckons
    that all others have as many more as it has. (The official code counts those of all workers,
    once all of them are matched.) Of given pairs, other queries follow from the micro-batch's.

    Args:
        name: of the group.
        queries: N.
        assignment: queries to objects.
        shared: pairs of all layers, where they have some.
        normalisers: sums over the global batch; ``objects`` times the copies of each.
        main: of the main group, whose share given pairs (denoising) take over, as official.
    """
    images, matched = normalisers["labelled_images"], normalisers.get(f"{_MATCHED}{name}")
    if matched is None:
        used = assignment.valid_mask
        others = images * (queries - used.sum() / max(1, len(used)))
        counts = QueryCounts.balanced(normalisers["objects"], others)
        return counts if main is None else replace(counts, share=main.share)
    others = images * queries - matched
    if shared is not None:
        matched, others = matched * shared.growth, others * shared.shrinkage
    return QueryCounts.balanced(matched, others)


def edge_losses(
    outputs: DecoderOutputs,
    targets: Targets,
    assignment: Assignment,
    shared: SharedPairs | None,
    counts: QueryCounts,
    objects: Tensor,
    config: SetCriterionConfig,
) -> dict[str, Tensor]:
    """Weighted FGL and DDF of one group; a weight of 0 leaves a term out.

    Args:
        outputs: with distributions, [L, B, N, ..].
        targets: ground truth.
        assignment: queries to objects, of L layers.
        shared: pairs of all layers, in its place.
        counts: of the global batch.
        objects: scalar, what FGL is divided by.
        config: weights.

    Returns:
        Scalars ``fgl`` and ``ddf``.
    """
    counted: Tensor = assignment.valid_mask
    if shared is not None:
        assignment, counted = shared.of_layers(outputs.layers), shared.weights
    losses = {}
    if config.fgl_weight:
        loss = fine_grained_loss(outputs, targets, assignment, counted, objects)
        losses["fgl"] = config.fgl_weight * loss
    if config.ddf_weight and outputs.layers > 1:
        loss = self_distillation_loss(outputs, targets, assignment, counts)
        losses["ddf"] = config.ddf_weight * loss
    return losses
