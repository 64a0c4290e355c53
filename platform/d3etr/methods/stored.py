"""A teacher's outputs as tensors that can be stored (``teacher.views``), and back.

Shapes: B images · L stored layers · n stored queries · C classes · H heads · E channels of a head ·
S tokens of the teacher's memory · V levels · D' width of the teacher · K bins of an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d3etr.attention_maps import (
    MASKED_SCORE,
    AttentionMaps,
    CrossMaps,
    ProductMaps,
    SampledMaps,
    ScoredMaps,
)
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.edge_distributions import BoxDistributions
from d3etr.errors import UserError
from d3etr.matching.edges import bin_distances
from d3etr.methods.base import Method, TeacherGroup, TeacherOutputs
from d3etr.methods.selection import map_layers, pick_queries, select_queries
from d3etr.structures import (
    MAIN,
    DecoderOutputs,
    Grids,
    ImageBatch,
    Levels,
    ObjectQueries,
    StoredOutputs,
)

_LOWEST = torch.finfo(torch.float16).min
"""Stands for ``MASKED_SCORE``, which float16 cannot hold; its probability is 0 as well."""


@dataclass(frozen=True)
class StoredParts:
    """What of a teacher's outputs is stored.

    Attributes:
        layers: of its decoder, ascending.
        queries: the most confident ones of an image (last layer); None: all.
        attention: whether maps are stored.
        distributions: whether distributions over edges are.
    """

    layers: tuple[int, ...]
    queries: int | None
    attention: bool
    distributions: bool = False

    @classmethod
    def of(cls, method: Method, queries: int | None) -> StoredParts:
        """What a method needs."""
        layers = tuple(sorted({*method.layers}))
        return cls(layers, queries, method.needs_attention, method.needs_distributions)


def outputs_to_store(
    teacher: DetectionTransformer, images: ImageBatch, parts: StoredParts
) -> tuple[dict[str, Tensor], Levels]:
    """Run the teacher.

    Args:
        teacher: in evaluation mode.
        images: B padded images.
        parts: what is kept.

    Returns:
        ``logits`` [B, L, n, C] and ``boxes`` [B, L, n, 4]; ``kept`` [B, n], which of the queries
        these are, where not all; the queries where they are each image's own; with attention its
        scores or their factors [B, L, H, n, ..], of which ``cross_key`` [B, S, L, H, E] and
        ``cross_scores`` [B, S, L, H, n] have a row for each token of the teacher's grids, which
        are returned too. With distributions their ``corners`` [B, L, n, 4, K], ``start`` [B, n, 4]
        and ``first_logits`` [B, n, C].

    Raises:
        UserError: the images are too small for so many queries.
    """
    memory = teacher.encode(images)
    queries = teacher.object_queries(memory).detach()
    [decoded] = teacher.decode(memory, [queries], attention=parts.attention)
    wanted, values = parts.queries or teacher.config.queries, {}
    if wanted > decoded.queries:
        raise UserError(
            f"an image gives the teacher {decoded.queries} queries, and {wanted} are to be stored: "
            f"set teacher.views.queries to {decoded.queries} at most, or use larger images"
        )
    outputs = map_layers(decoded, list(parts.layers))
    if parts.queries is not None:
        kept = decoded.confidence()[-1].topk(parts.queries, dim=1).indices.sort(1).values
        outputs, queries = select_queries(outputs, kept), pick_queries(queries, kept)
        values["kept"] = kept.int()
    values["logits"] = outputs.logits.transpose(0, 1)
    values["boxes"] = outputs.boxes_cxcywh.transpose(0, 1)
    values |= _factors(outputs) if parts.attention else {}
    if parts.distributions and (edges := outputs.distributions) is not None:
        values |= {"start": edges.start, "first_logits": edges.first_logits}
        values["corners"] = edges.corners.transpose(0, 1)
    if teacher.config.queries_need_images:
        own = {
            "embedding": queries.embedding,
            "reference": queries.reference_logits,
            "reference_boxes": queries.reference_boxes,
            "content": queries.content,
            "place": queries.place,
        }
        values |= {name: part for name, part in own.items() if part is not None}
    return values, outputs.levels


def _factors(outputs: DecoderOutputs) -> dict[str, Tensor]:
    """What the maps are computed from, images first: scores, or where kernels run their factors."""
    within, across = outputs.self_maps, outputs.cross_maps
    assert within is not None and across is not None
    if isinstance(within, ScoredMaps):
        found = {"self_scores": within.values.transpose(0, 1)}
    else:
        query, key = within.query.transpose(0, 1), within.key.transpose(0, 1)
        found = {"self_query": query, "self_key": key}
    if isinstance(across, ScoredMaps):
        scores = across.values.clamp(min=_LOWEST).permute(1, 4, 0, 2, 3)
        return found | {"cross_scores": scores}
    if isinstance(across, SampledMaps):
        places, weights = across.locations.transpose(0, 1), across.weights.transpose(0, 1)
        return found | {"cross_locations": places, "cross_weights": weights}
    query, key = across.query.transpose(0, 1), across.key.permute(1, 3, 0, 2, 4)
    return found | {"cross_query": query, "cross_key": key}


def restored_outputs(
    stored: StoredOutputs, teacher: DetectionTransformer, layers: Sequence[int]
) -> TeacherOutputs:
    """What ``Distiller.run_teacher`` returns, of a teacher that did not run.

    Args:
        stored: of a batch.
        teacher: gives queries that do not depend on the image.
        layers: its layer for each of the student's.
    """
    values = {
        name: value.float() if value.is_floating_point() else value
        for name, value in stored.values.items()
    }
    kept = values["kept"].long() if "kept" in values else None
    if "embedding" in values:
        queries = ObjectQueries(
            values["embedding"],
            values.get("reference"),
            values.get("content"),
            values.get("place"),
            Grids(stored.levels, teacher.level_strides),
            reference_boxes=values.get("reference_boxes"),
        )
    else:
        queries = teacher.object_queries().detach()
        queries = queries if kept is None else pick_queries(queries, kept)
    within, across = _maps(values, stored.levels)
    outputs = DecoderOutputs(
        values["logits"].transpose(0, 1),
        values["boxes"].transpose(0, 1),
        within,
        across,
        stored.levels,
        values.get("hidden"),
        softmax_classes=teacher.config.softmax_classes,
        distributions=_distributions(values, teacher.config),
    )
    known = sorted({*layers})
    outputs = map_layers(outputs, [known.index(layer) for layer in layers])
    return TeacherOutputs(queries, {MAIN: TeacherGroup(queries, outputs, kept)})


def _distributions(values: dict[str, Tensor], teacher: DetectorConfig) -> BoxDistributions | None:
    """Those that were stored, outside any graph."""
    if "corners" not in values:
        return None
    corners, start = values["corners"].transpose(0, 1), values["start"]
    bound, curvature = teacher.edge_bins["bound"], teacher.edge_bins["curvature"]
    distances = bin_distances(corners.shape[-1], bound, curvature, start.device)
    logits = values["first_logits"]
    return BoxDistributions(corners, start, logits, start, distances, curvature)


def _maps(
    values: dict[str, Tensor], levels: Levels
) -> tuple[AttentionMaps | None, CrossMaps | None]:
    """Self- and cross-attention, where they were stored."""
    within: AttentionMaps
    if "self_scores" in values:
        within = ScoredMaps(values["self_scores"].transpose(0, 1))
    elif "self_query" in values:
        query, key = values["self_query"].transpose(0, 1), values["self_key"].transpose(0, 1)
        within = ProductMaps(query, key)
    else:
        return None, None
    hidden = values["hidden"]
    if "cross_locations" in values:
        places, weights = (values[f"cross_{x}"].transpose(0, 1) for x in ("locations", "weights"))
        return within, SampledMaps(places, weights, levels, hidden)
    if "cross_scores" in values:
        scores = values["cross_scores"].permute(2, 0, 3, 4, 1)
        return within, ScoredMaps(scores.masked_fill(hidden[:, None, None], MASKED_SCORE))
    query, key = values["cross_query"].transpose(0, 1), values["cross_key"].permute(2, 0, 3, 1, 4)
    return within, ProductMaps(query, key, hidden)
