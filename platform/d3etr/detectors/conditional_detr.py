"""Conditional DETR (Meng et al., arXiv 2108.06152).

Shapes: B images · L decoder layers · N queries · C classes · S = h*w memory tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.attention import ConditionalCrossAttention, ConditionalSelfAttention
from d3etr.detectors.base import SingleScaleDetector
from d3etr.detectors.groups import Decoded, GroupSize, side_by_side
from d3etr.detectors.heads import predict_boxes
from d3etr.detectors.initialisation import (
    attend_to_references,
    initialise_box_head,
    initialise_class_head,
    initialise_transformer,
)
from d3etr.detectors.transformer import MLP, Activation, DecoderLayer, relu, run_decoder
from d3etr.structures import Memory, ObjectQueries


class ConditionalDETRConfig(DetectorConfig):
    """Conditional DETR."""

    name: Literal["conditional_detr"] = "conditional_detr"
    cross_attention_init: Literal["random", "reference_prior"] = "random"
    """How cross-attention begins. random: random projections, the official code's.
    reference_prior: around each query's reference point (our choice), which spares small data sets
    the steps that it takes to find out."""

    @property
    def reference_size(self) -> int:
        """Queries have reference points."""
        return 2

    @property
    def derives_references(self) -> bool:
        """A small network makes reference points from embeddings."""
        return True


def conditional_layers(config: DetectorConfig, activation: Activation = relu) -> nn.ModuleList:
    """L decoder layers with conditional attention.

    Args:
        config: uses decoder_layers and what its layers use.
        activation: of their feed-forward blocks.
    """
    return nn.ModuleList(
        DecoderLayer(
            config,
            ConditionalSelfAttention(config),
            ConditionalCrossAttention(config, first=index == 0),
            activation,
        )
        for index in range(config.decoder_layers)
    )


class ConditionalDecoder(nn.Module):
    """The layers, and the transformation of reference points between them.

    Args:
        config: uses width and what its layers use.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.layers = conditional_layers(config)
        self.query_scale = MLP((config.width, config.width, config.width))
        # The first layer has no use for it: workers would wait for its gradient for ever.
        self.query_scale.requires_grad_(config.decoder_layers > 1)
        self.norm = nn.LayerNorm(config.width)


class ConditionalDETR(SingleScaleDetector):
    """Queries look for distinct regions around reference points.

    Args:
        config: architecture.
        classes: C.
    """

    config: ConditionalDETRConfig
    config_class = ConditionalDETRConfig

    def __init__(self, config: ConditionalDETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        width = config.width
        self.decoder = ConditionalDecoder(config)
        self.ref_point_head = MLP((width, width, 2))
        self.query_embedding = nn.Embedding(config.queries, width)
        self.class_head = nn.Linear(width, classes)
        self.box_head = MLP((width, width, width, 4))
        for part in (self.encoder, self.decoder, self.ref_point_head):
            initialise_transformer(part)
        initialise_class_head(self.class_head)
        initialise_box_head(self.box_head, config.box_size_bias)
        if config.cross_attention_init == "reference_prior":
            attend_to_references(self.decoder, self.decoder.query_scale)

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The detector's own queries: embedding [N, D], reference points [N, 2] as logits."""
        embedding = self.query_embedding.weight
        return ObjectQueries(embedding, self.derive_references(embedding))

    def derive_references(self, embedding: Tensor) -> Tensor:
        """[.., N, D] embeddings to reference points [.., N, 2] as logits."""
        # float32 also under autocast: 8 bits of mantissa are 1/256 of the image.
        with torch.autocast(embedding.device.type, enabled=False):
            return self.ref_point_head(embedding.float())  # type: ignore[no-any-return]

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``."""
        embedding = side_by_side([group.embedding for group in groups])
        reference = self.references(groups)
        encoded = self.position.points(reference.sigmoid())

        def aim(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            # lambda_q of equation 3 is 1 in the first layer: queries have no content yet.
            return embedding, encoded * self.decoder.query_scale(hidden) if index else encoded

        hidden = self.zero_states(embedding, memory)
        states, trace = run_decoder(self.decoder.layers, hidden, aim, memory, sizes, attention)
        normed = self.decoder.norm(torch.stack(states))
        logits = self.class_head(normed).float()
        boxes = predict_boxes(self.box_head, normed, reference)
        return Decoded(logits, boxes, normed[-1], trace)
