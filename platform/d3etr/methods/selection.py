"""Which of a teacher's layers and queries a student learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from d3etr.attention_maps import AttentionMaps, CrossMaps, take_layers
from d3etr.errors import UserError
from d3etr.matching.assignment import gather_queries
from d3etr.structures import DecoderOutputs, ObjectQueries

LayerMap = Literal["uniform", "last"] | Sequence[int]


def share_of(count: int, ratio: float) -> int:
    """``ratio`` times ``count``, rounded up, at least 1."""
    # Rounded first: 100 * 0.07 is 7.000000000000001.
    return max(1, math.ceil(round(count * ratio, 6)))


def teacher_layers(mapping: LayerMap, student: int, teacher: int) -> list[int]:
    """Teacher layer index for each student layer; equal depths map layer to layer.

    Args:
        mapping: ``uniform`` spreads the teacher's layers, ``last`` lets its last layer teach
            all, a sequence names them. The last layer always teaches the last.
        student: decoder layers of the student.
        teacher: decoder layers of the teacher.

    Raises:
        UserError: an explicit mapping has another length, names a layer that is not there, or
            does not end with the last.
    """
    if mapping == "last":
        return [teacher - 1] * student
    if isinstance(mapping, str):
        # Rounded up: ends with teacher - 1, and is the identity at equal depths.
        return [-((layer + 1) * teacher // -student) - 1 for layer in range(student)]
    layers = list(mapping)
    if len(layers) != student or max(layers) >= teacher or layers[-1] != teacher - 1:
        raise UserError(
            f"distillation.layer_map is {layers}: expected {student} entries (one per student "
            f"decoder layer), each below {teacher} (the teacher's decoder layers), the last "
            f"being {teacher - 1}"
        )
    return layers


def map_layers(outputs: DecoderOutputs, layers: list[int]) -> DecoderOutputs:
    """The outputs of the given layers; the same object when that changes nothing."""
    if layers == list(range(outputs.layers)):
        return outputs
    return _taken(
        outputs,
        lambda values: take_layers(values, layers),
        lambda maps: maps.layers(layers),
        lambda maps: maps.layers(layers),
        lambda boxes: boxes,
    )


def select_queries(outputs: DecoderOutputs, index: Tensor) -> DecoderOutputs:
    """The outputs of some queries of each image, [B, K] indices; attention is renormalised."""
    every_layer = index[None].expand(outputs.layers, -1, -1)
    return _taken(
        outputs,
        lambda values: gather_queries(values, every_layer),
        lambda maps: maps.pairs(every_layer),
        lambda maps: maps.rows(every_layer),
        lambda boxes: gather_queries(boxes[None], index[None])[0],
    )


def _taken(
    outputs: DecoderOutputs,
    values: Callable[[Tensor], Tensor],
    self_maps: Callable[[AttentionMaps], AttentionMaps],
    cross_maps: Callable[[CrossMaps], CrossMaps],
    boxes: Callable[[Tensor], Tensor],
) -> DecoderOutputs:
    """A part of a teacher's outputs; ``boxes`` takes it of what has no layers."""
    edges = outputs.distributions
    return replace(
        outputs,
        logits=values(outputs.logits),
        boxes_cxcywh=values(outputs.boxes_cxcywh),
        self_maps=None if outputs.self_maps is None else self_maps(outputs.self_maps),
        cross_maps=None if outputs.cross_maps is None else cross_maps(outputs.cross_maps),
        no_object=None,
        distributions=edges and edges.map(values, boxes),
    )


def select_teacher_queries(
    outputs: DecoderOutputs, queries: ObjectQueries, ratio: float
) -> tuple[DecoderOutputs, ObjectQueries]:
    """The share of the teacher's queries that forms the auxiliary group, and its outputs.

    Args:
        outputs: all M queries, mapped to the student's layers.
        queries: the teacher's own queries [M, D] or [B, M, D].
        ratio: ``teacher_query_ratio`` q; below 1, each image keeps its most confident queries
            by the last layer.
    """
    kept = share_of(outputs.queries, ratio)
    if kept == outputs.queries:
        return outputs, queries
    index = outputs.confidence()[-1].topk(kept, dim=1).indices
    return select_queries(outputs, index), pick_queries(queries, index)


def pick_queries(queries: ObjectQueries, index: Tensor) -> ObjectQueries:
    """Some of the queries [M, ..] or [B, M, ..] for each image: [B, K, ..] at ``index`` [B, K]."""

    def pick(part: Tensor) -> Tensor:
        if part.dim() == 2:
            return part[index]
        return part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))

    place = None if queries.place is None else queries.place.gather(1, index)
    return replace(queries.map(pick), place=place, grids=queries.grids)
