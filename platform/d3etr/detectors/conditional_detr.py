"""Conditional DETR (Meng et al., arXiv 2108.06152).

Shapes: B images · L decoder layers · N queries · C classes · S = h*w memory tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.conditional_decoder import AttentionScores, ConditionalDecoder
from d3etr.detectors.encoder import Encoder
from d3etr.detectors.first_looks import look_at_references
from d3etr.detectors.initialisation import initialise_heads, initialise_transformer
from d3etr.detectors.layers import MLP
from d3etr.detectors.position import SineEncoding
from d3etr.structures import DecoderOutputs, ImageBatch, Memory, ObjectQueries


class ConditionalDETR(nn.Module):
    """Backbone, encoder, conditional decoder and heads; implements ``structures.Detector``.

    Args:
        config: architecture.
        classes: C.

    Attributes:
        config: the architecture.
        classes: C.
        stride: pixels per memory cell.
    """

    def __init__(self, config: DetectorConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.classes = classes
        width = config.width
        self.backbone = build_backbone(config.backbone)
        self.stride = self.backbone.stride
        self.projection = nn.Linear(self.backbone.channels, width)
        self.position = SineEncoding(width)
        self.encoder = Encoder(config)
        self.decoder = ConditionalDecoder(config)
        self.ref_point_head = MLP((width, width, 2))
        self.query_embedding = nn.Embedding(config.queries, width)
        self.class_head = nn.Linear(width, classes)
        self.box_head = MLP((width, width, width, 4))
        for part in (self.encoder, self.decoder, self.ref_point_head):
            initialise_transformer(part)
        initialise_heads(self.class_head, self.box_head, config.box_size_bias)
        if config.first_looks == "reference":
            look_at_references(self.decoder)

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder.

        Args:
            images: B padded images.

        Returns:
            Memory of S = ceil(height / stride) * ceil(width / stride) tokens.
        """
        return self.encode_features(self.backbone(images.pixels), images.padding)

    def encode_features(self, features: Tensor, padding: Tensor | None) -> Memory:
        """Run the encoder on backbone features.

        Args:
            features: [B, channels, h, w].
            padding: [B, height, width] bool at the images' resolution, or None.
        """
        grid = (features.shape[-2], features.shape[-1])
        # A 1x1 convolution; on channels-last features the reordering is free.
        tokens = self.projection(features.permute(0, 2, 3, 1).flatten(1, 2))
        if padding is not None:
            padding = functional.interpolate(padding[None].float(), size=grid)[0].bool()
        position = self.position.grid(grid, padding)
        if padding is not None:
            padding = padding.flatten(1)
        tokens = self.encoder(tokens, position, padding)
        return Memory(tokens, position, padding, grid)

    def object_queries(self) -> ObjectQueries:
        """The detector's own queries: embedding [N, D], reference points [N, 2] as logits."""
        embedding = self.query_embedding.weight
        return ObjectQueries(embedding, self._reference_logits(embedding))

    def _reference_logits(self, embedding: Tensor) -> Tensor:
        # float32 also under autocast: 8 bits of mantissa are 1/256 of the image.
        with torch.autocast(embedding.device.type, enabled=False):
            return self.ref_point_head(embedding.float())  # type: ignore[no-any-return]

    def decode(
        self, memory: Memory, groups: Sequence[ObjectQueries], *, attention: bool = False
    ) -> list[DecoderOutputs]:
        """Decode query groups side by side in one pass; groups never see each other.

        Args:
            memory: encoder output.
            groups: a group's reference points are used as they are, whoever made them; a group
                without any gets this detector's for its embedding.
            attention: also return the attention scores of every layer.

        Returns:
            One entry per group.
        """
        sizes = [group.count for group in groups]
        embedding = _side_by_side([group.embedding for group in groups])
        reference = _side_by_side([self._reference_of(group) for group in groups]).float()
        encoded = self.position.points(reference.sigmoid())
        states, scores = self.decoder(embedding, encoded, memory, sizes, attention)
        logits = self.class_head(states).float()
        boxes = self._boxes(states, reference)
        return _split(memory, sizes, logits, boxes, scores)

    def _reference_of(self, group: ObjectQueries) -> Tensor:
        if group.reference_logits is None:
            return self._reference_logits(group.embedding)
        if group.reference_logits.shape[-1] != 2:
            raise ValueError("Conditional DETR takes reference points [.., N, 2], not anchor boxes")
        return group.reference_logits

    def _boxes(self, states: Tensor, reference: Tensor) -> Tensor:
        """[L, B, N, 4] cxcywh in [0, 1]; centres are offsets from the reference points."""
        with torch.autocast(states.device.type, enabled=False):
            offsets = self.box_head(states.float())
            return (offsets + functional.pad(reference, (0, 2))).sigmoid()  # type: ignore[no-any-return]


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate [N, X] or [B, N, X] along N to [B or 1, N, X]."""
    parts = [part if part.dim() == 3 else part[None] for part in parts]
    images = max(len(part) for part in parts)
    return torch.cat([part.expand(images, -1, -1) for part in parts], 1)


def _split(
    memory: Memory,
    sizes: list[int],
    logits: Tensor,
    boxes: Tensor,
    scores: AttentionScores | None,
) -> list[DecoderOutputs]:
    """Cut [L, B, N, ..] outputs of all groups into one entry per group."""
    per_group = [
        DecoderOutputs(z, b, None, None, memory.grid, memory.padding)
        for z, b in zip(torch.split(logits, sizes, 2), torch.split(boxes, sizes, 2), strict=True)
    ]
    if scores is None:
        return per_group
    across = torch.split(torch.stack(scores.across), sizes, 3)
    within = scores.stacked_within(len(memory.tokens))
    return [
        replace(outputs, self_attention_scores=own, cross_attention_scores=other)
        for outputs, own, other in zip(per_group, within, across, strict=True)
    ]
