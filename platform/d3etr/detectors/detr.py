"""DETR (Carion et al., arXiv 2005.12872).

Shapes: B images · L decoder layers · N queries · C classes · S memory tokens · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import SingleScaleDetector
from d3etr.detectors.groups import AttentionTrace, side_by_side, split_groups, zero_states
from d3etr.detectors.heads import predict_boxes, sigmoid_logits
from d3etr.detectors.initialisation import (
    initialise_class_head,
    initialise_sizes,
    initialise_transformer,
)
from d3etr.detectors.layers import MLP, FeedForward
from d3etr.detectors.query_attention import MemoryAttention, QuerySelfAttention
from d3etr.structures import DecoderOutputs, Memory, ObjectQueries


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
    def criterion_defaults(self) -> Mapping[str, float]:
        """DETR weighs and costs classes 1 where one softmax tells them apart."""
        return {"class_weight": 1.0, "class_cost": 1.0} if self.softmax_classes else {}

    @model_validator(mode="after")
    def _unused_outputs_have_an_effect(self) -> Self:
        if self.unused_outputs and not self.softmax_classes:
            raise ValueError("unused_outputs has no effect without classification 'softmax'")
        return self


class DETRDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, all post-norm.

    Args:
        config: uses width, heads, feedforward and dropout.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        sizes = (config.width, config.heads, config.dropout)
        self.self_attention = QuerySelfAttention(*sizes)
        self.self_norm = nn.LayerNorm(config.width)
        self.cross_attention = MemoryAttention(*sizes)
        self.cross_norm = nn.LayerNorm(config.width)
        self.feedforward = FeedForward(config.width, config.feedforward, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        memory: Memory,
        sizes: list[int],
        trace: AttentionTrace | None,
    ) -> Tensor:
        """One layer for all groups.

        Args:
            hidden: [B or 1, N, D].
            embedding: [B or 1, N, D].
            memory: encoder output.
            sizes: queries of each group.
            trace: this layer's attention is appended to it, if there is one.

        Returns:
            [B, N, D].
        """
        attention = trace is not None
        mixed, within = self.self_attention(hidden, embedding, sizes, attention)
        hidden = self.self_norm(hidden + self.dropout(mixed))
        mixed, across = self.cross_attention(
            hidden, embedding, memory.tokens, memory.position, memory.padding, attention
        )
        hidden = self.cross_norm(hidden + self.dropout(mixed))
        if trace is not None and across is not None:
            trace.within.append(within)
            trace.across.append(across)
        return self.feedforward(hidden)  # type: ignore[no-any-return]


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
        self.decoder = nn.ModuleList(DETRDecoderLayer(config) for _ in range(config.decoder_layers))
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

    def decode(
        self, memory: Memory, groups: Sequence[ObjectQueries], *, attention: bool = False
    ) -> list[DecoderOutputs]:
        """Decode query groups side by side; reference points are not used."""
        sizes = [group.count for group in groups]
        embedding = side_by_side([group.embedding for group in groups])
        trace = AttentionTrace() if attention else None
        per_image = self.training and self.config.dropout > 0
        hidden = zero_states(embedding, len(memory.tokens), per_image)
        states = []
        for layer in self.decoder:
            hidden = layer(hidden, embedding, memory, sizes, trace)
            states.append(hidden)
        normed = self.decoder_norm(torch.stack(states))
        logits, no_object = self.class_head(normed).float(), None
        if self.softmax_classes:
            no_object = logits[..., -1] - logits.logsumexp(-1)
            logits = sigmoid_logits(logits, self.classes)
        boxes = predict_boxes(self.box_head, normed)
        return split_groups(memory, sizes, logits, boxes, normed[-1], trace, no_object)
