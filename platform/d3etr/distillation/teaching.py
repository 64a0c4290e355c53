"""What a teacher hands to a student for one batch, and what the losses are divided by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d3etr.attention_maps import take_layers
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import DistillationConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.criterion import query_weights
from d3etr.distillation.correspondence import kept_pairs, share_of
from d3etr.matching.assignment import gather_queries
from d3etr.structures import DecoderOutputs, ObjectQueries, Targets


@dataclass(frozen=True)
class Taught:
    """The teacher's side of one batch, outside the autograd graph.

    Attributes:
        outputs: all M queries, one teacher layer per student layer; ``states`` only where
            features are distilled.
        group: the outputs of the queries that form the auxiliary group.
        queries: those queries themselves, with the teacher's width.
        tokens: [B, S, D'] memory; None unless features are distilled.
        general: of the general points, the same layers; None without any.
        points: the general points.
        stream: of a GPU, where all this is being computed; None for the current one.
    """

    outputs: DecoderOutputs
    group: DecoderOutputs
    queries: ObjectQueries
    tokens: Tensor | None = None
    general: DecoderOutputs | None = None
    points: ObjectQueries | None = None
    stream: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """Let the device's current work wait for what the teacher says, not the host."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


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


def group_size(queries: int, ratio: float) -> int:
    """Queries of the auxiliary group: ``teacher_query_ratio`` times M, at least 1."""
    return share_of(queries, ratio)


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


def passed_on(
    outputs: DecoderOutputs, queries: ObjectQueries, ratio: float
) -> tuple[DecoderOutputs, ObjectQueries]:
    """The share of the teacher's queries that forms the auxiliary group, and its outputs.

    Args:
        outputs: all M queries, mapped to the student's layers.
        queries: the teacher's own queries [M, D] or [B, M, D].
        ratio: ``teacher_query_ratio`` q; below 1, each image keeps its most confident queries
            by the last layer.
    """
    kept = group_size(outputs.queries, ratio)
    if kept == outputs.queries:
        return outputs, queries
    index = outputs.confidence()[-1].topk(kept, dim=1).indices
    return select_queries(outputs, index), _most_confident(queries, index)


@dataclass(frozen=True)
class Normalisers:
    """What losses are divided by, summed over the global batch.

    Attributes:
        objects: scalar, ground truth objects.
        images: scalar.
        classes: [2] weights of the main and the auxiliary group's queries in the cross entropy of a
            student whose classes are exclusive; else 0.
        fixed: [L] teacher confidence summed over the auxiliary group's queries.
        adaptive: [L] ``best_confidence`` summed over queries and images.
        general: [L] teacher confidence summed over the general points.
    """

    objects: Tensor
    images: Tensor
    classes: Tensor
    fixed: Tensor
    adaptive: Tensor
    general: Tensor

    def pack(self) -> Tensor:
        """One vector [4 + 3 L], so that adding over workers takes one reduction."""
        scalars = (self.objects[None], self.images[None], self.classes)
        return torch.cat([*scalars, self.fixed, self.adaptive, self.general])

    @staticmethod
    def unpack(packed: Tensor) -> Normalisers:
        """Inverse of ``pack``."""
        return Normalisers(packed[0], packed[1], packed[2:4], *packed[4:].chunk(3))


def best_confidence(
    outputs: DecoderOutputs, student_queries: int, config: DistillationConfig
) -> Tensor:
    """The teacher's confidence in as many of its queries as there will be adaptive pairs.

    The most confident ones, known before any pair is found: what an image brings into the
    normaliser. Where every teacher query is matched they are the pairs; where the student has
    fewer queries, weights of an image's pairs are scaled to sum to theirs (our choice), so that
    those of the global batch sum to 1 however it is cut.

    Args:
        outputs: the teacher's, [L, B, M, ..].
        student_queries: N.
        config: how many pairs are kept.

    Returns:
        [L, B, P].
    """
    kept = kept_pairs(student_queries, outputs.queries, config.matched_pair_ratio)
    return outputs.confidence().float().topk(kept, dim=2).values


def normalisers(
    targets: Targets,
    taught: Taught | None,
    student: DetectorConfig,
    teacher: DetectorConfig | None,
    config: DistillationConfig,
    criterion: SetCriterionConfig,
) -> Normalisers:
    """The local sums of one batch; all are known before the student runs."""
    device = targets.labels.device
    objects = targets.objects.sum().float()
    images = torch.full_like(objects, len(targets.counts))
    nothing = torch.zeros(student.decoder_layers, device=device)
    classes = torch.zeros(2, device=device)
    if student.softmax_classes:
        sizes = (student.queries, _auxiliary_queries(taught, teacher, config))
        classes = torch.stack([query_weights(targets, size, criterion) for size in sizes])
    if taught is None:
        return Normalisers(objects, images, classes, nothing, nothing, nothing)
    return Normalisers(
        objects,
        images,
        classes,
        fixed=taught.group.confidence().float().sum((1, 2)),
        adaptive=best_confidence(taught.outputs, student.queries, config).sum((1, 2)),
        general=(
            nothing if taught.general is None else taught.general.confidence().float().sum((1, 2))
        ),
    )


def _auxiliary_queries(
    taught: Taught | None, teacher: DetectorConfig | None, config: DistillationConfig
) -> int:
    """Queries of the auxiliary group; 0 where there is none."""
    if taught is not None:
        return taught.group.queries
    if teacher is None or not config.has_auxiliary_group:
        return 0
    return group_size(teacher.queries, config.teacher_query_ratio)
