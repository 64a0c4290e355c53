"""One assignment for all layers: the union of their matches (D-FINE, arXiv 2410.13842).

A query that several layers match with different objects has the one of most of them, and of equally
many the first of its image, as the official code's ``_get_go_indices`` sorts them. Everything stays
on the device: how many pairs an image has, the host never learns.

Shapes: L decoder layers · B images · N queries · P slots of pairs · T objects of the fullest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d3etr.matching.assignment import Assignment


@dataclass(frozen=True)
class SharedPairs:
    """Pairs that all layers have, and how their numbers compare with those of a single matching.

    Attributes:
        assignment: of one layer, [1, B, P].
        weights: [B, P] of the pairs; those of an image add up to its objects. 0 in unused slots.
        growth: [B] at least 1: pairs of an image, as a factor on those of one layer; 1 where it has
            no objects.
        shrinkage: [B] at most 1: likewise of queries without an object; 1 where all have one.
    """

    assignment: Assignment
    weights: Tensor
    growth: Tensor
    shrinkage: Tensor

    def of_layers(self, layers: int) -> Assignment:
        """The assignment of each of so many layers."""
        own = self.assignment
        rows, columns = (x.expand(layers, -1, -1) for x in (own.rows, own.columns))
        return Assignment(rows, columns, own.counts, own.valid_mask)


def given_assignment(
    objects: Tensor,
    layers: int,
    pairs: tuple[int, ...] | None = None,
    slots: int | None = None,
) -> Assignment:
    """Queries with objects that are known, the same in each layer.

    Args:
        objects: [B, N] int64 index of each query's object, -1 for none.
        layers: L.
        pairs: queries of each image, or more images, that have an object; empty where only the
            device knows; None waits for it to count them.
        slots: P, at least as many as any image has; None: N.
    """
    used = objects >= 0
    # Queries with an object first, in order: the slots behind them are unused.
    rows = used.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
    valid = used.gather(1, rows)
    columns = objects.gather(1, rows).clamp(min=0)
    counts = tuple(used.sum(1).tolist()) if pairs is None else pairs[: len(objects)]
    expand = (layers, -1, -1)
    return Assignment(
        (rows * valid).expand(expand), (columns * valid).expand(expand), counts, valid
    )


def shared_pairs(
    matchings: Sequence[Assignment], num_objects: Tensor, queries: int, objects: int
) -> SharedPairs:
    """The union of matchings of the same queries and objects.

    Args:
        matchings: [L, B, P] each; every layer of each has one vote.
        num_objects: [B] objects of each image.
        queries: N.
        objects: T.
    """
    images, device = len(num_objects), num_objects.device
    none = queries * objects
    votes = torch.zeros(images, none + 1, dtype=torch.int32, device=device)
    slots = 0
    for one in matchings:
        places = (one.rows * objects + one.columns).where(one.valid_mask, none)
        places = places.transpose(0, 1).flatten(1)
        votes.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int32))
        slots += places.shape[1]
    found = torch.full((images, queries), -1, dtype=torch.int64, device=device)
    if objects:
        most, best = votes[:, :none].view(images, queries, objects).max(-1)
        found = best.where(most > 0, -1)
    assignment = given_assignment(found, 1, (), slots=min(queries, slots))
    pairs, single = assignment.valid_mask.sum(1).float(), num_objects.clamp(max=queries).float()
    weights = assignment.valid_mask * (num_objects / pairs.clamp(min=1))[:, None]
    growth = torch.where(single > 0, pairs / single.clamp(min=1), 1.0)
    rest = queries - single
    shrinkage = torch.where(rest > 0, (queries - pairs) / rest.clamp(min=1), 1.0)
    return SharedPairs(assignment, weights, growth, shrinkage)
