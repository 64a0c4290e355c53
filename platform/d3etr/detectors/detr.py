"""DETR (Carion et al., arXiv 2005.12872).

Shapes: B images · L decoder layers · N queries · C classes · S memory tokens · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import CrossAttention, SelfAttention
from d3etr.detectors.base import SingleScaleDetector
from d3etr.detectors.groups import Decoded, GroupSize, side_by_side
from d3etr.detectors.heads import predict_boxes, sigmoid_logits
from d3etr.detectors.initialisation import (
    initialise_class_head,
    initialise_sizes,
    initialise_transformer,
)
from d3etr.detectors.transformer import MLP, DecoderLayer, run_decoder
from d3etr.structures import Memory, ObjectQueries


class DETRConfig(DetectorConfig):
    """DETR."""

    name: Literal["detr"] = "detr"
    classification: Literal["sigmoid", "softmax"] = "sigmoid"
    """softmax: over classes and "no object", the official DETR's."""
    unused_outputs: Annotated[int, Field(ge=0, le=65_536)] = 0
    """With softmax only: outputs that take part in it and are no class; imported weights have
    them where ids of COCO's list belong to no category."""

    @property
    def softmax_classes(self) -> bool:
        """Whether classes and "no object" share one softmax."""
        return self.classification == "softmax"

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """DETR weighs and costs classes 1 where one softmax tells them apart."""
        return {"class_weight": 1.0, "class_cost": 1.0} if self.softmax_classes else {}

    @model_validator(mode="after")
    def _unused_outputs_have_an_effect(self) -> Self:
        if self.unused_outputs and not self.softmax_classes:
            raise ValueError("unused_outputs has no effect without classification 'softmax'")
        return self


class DETR(SingleScaleDetector):
    """Queries are learned embeddings without a place of their own.

    The official detector tells classes and "no object" apart by one softmax. Its probabilities
    are handed on as the logits whose sigmoids they are, so that everything behind a detector
    reads all of them alike; ``classification: sigmoid`` is Conditional DETR's head instead.

    Args:
        config: architecture.
        classes: C.
    """

    config: DETRConfig
    config_class = DETRConfig

    def __init__(self, config: DETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        width = config.width
        self.decoder = nn.ModuleList(
            DecoderLayer(config, SelfAttention(config), CrossAttention(config))
            for _ in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.query_embedding = nn.Embedding(config.queries, width)
        self.softmax_classes = config.softmax_classes
        others = config.unused_outputs + self.softmax_classes
        self.class_head = nn.Linear(width, classes + others)
        self.box_head = MLP((width, width, width, 4))
        for part in (self.encoder, self.decoder):
            initialise_transformer(part)
        if not self.softmax_classes:
            initialise_class_head(self.class_head)
        initialise_sizes(self.box_head, config.box_size_bias)

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The detector's own queries: embedding [N, D]."""
        return ObjectQueries(self.query_embedding.weight)

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; reference points are not used."""
        embedding = side_by_side([group.embedding for group in groups])
        hidden = self.zero_states(embedding, memory)
        states, trace = run_decoder(
            self.decoder, hidden, lambda index, hidden: (embedding, None), memory, sizes, attention
        )
        normed = self.decoder_norm(torch.stack(states))
        logits, no_object = self.class_head(normed).float(), None
        if self.softmax_classes:
            no_object = logits[..., -1] - logits.logsumexp(-1)
            logits = sigmoid_logits(logits, self.classes)
        boxes = predict_boxes(self.box_head, normed)
        return Decoded(logits, boxes, normed[-1], trace, no_object)
