"""Which of a teacher's layers and queries a student learns from."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from d3etr.attention_maps import take_layers
from d3etr.matching.assignment import gather_queries
from d3etr.methods.correspondence import kept_pairs, share_of
from d3etr.structures import DecoderOutputs, ObjectQueries


def map_layers(outputs: DecoderOutputs, layers: list[int]) -> DecoderOutputs:
    """The outputs of the given layers; the same object when that changes nothing."""
    if layers == list(range(outputs.layers)):
        return outputs

    self_maps, cross_maps = outputs.self_maps, outputs.cross_maps
    return replace(
        outputs,
        logits=take_layers(outputs.logits, layers),
        boxes_cxcywh=take_layers(outputs.boxes_cxcywh, layers),
        self_maps=None if self_maps is None else self_maps.layers(layers),
        cross_maps=None if cross_maps is None else cross_maps.layers(layers),
        no_object=None,
    )


def select_queries(outputs: DecoderOutputs, index: Tensor) -> DecoderOutputs:
    """The outputs of some queries of each image, [B, K] indices; attention is renormalised."""
    every_layer = index[None].expand(outputs.layers, -1, -1)
    self_maps, cross_maps = outputs.self_maps, outputs.cross_maps
    return replace(
        outputs,
        logits=gather_queries(outputs.logits, every_layer),
        boxes_cxcywh=gather_queries(outputs.boxes_cxcywh, every_layer),
        self_maps=None if self_maps is None else self_maps.pairs(every_layer),
        cross_maps=None if cross_maps is None else cross_maps.rows(every_layer),
        no_object=None,
    )


def _most_confident(queries: ObjectQueries, index: Tensor) -> ObjectQueries:
    """Queries at [B, K] indices: [N, D] or [B, N, D] to [B, K, D]."""

    def pick(part: Tensor) -> Tensor:
        if part.dim() == 2:
            return part[index]
        return part.gather(1, index[..., None].expand(-1, -1, part.shape[-1]))

    reference, content = queries.reference_logits, queries.content
    return ObjectQueries(
        pick(queries.embedding),
        None if reference is None else pick(reference),
        None if content is None else pick(content),
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
    return select_queries(outputs, index), _most_confident(queries, index)


def best_confidence(outputs: DecoderOutputs, student_queries: int, ratio: float) -> Tensor:
    """The teacher's confidence in as many of its queries as there will be adaptive pairs.

    The most confident ones, known before any pair is found: what an image brings into the
    normaliser. Where every teacher query is matched they are the pairs; where the student has
    fewer queries, weights of an image's pairs are scaled to sum to theirs (our choice), so that
    those of the global batch sum to 1 however it is cut.

    Args:
        outputs: the teacher's, [L, B, M, ..].
        student_queries: N.
        ratio: ``matched_pair_ratio``, share of the pairs that are kept.

    Returns:
        [L, B, P].
    """
    kept = kept_pairs(student_queries, outputs.queries, ratio)
    return outputs.confidence().float().topk(kept, dim=2).values
