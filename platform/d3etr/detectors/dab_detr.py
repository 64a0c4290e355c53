"""DAB-DETR (Liu et al., arXiv 2201.12329): queries are anchor boxes, refined layer by layer.

Shapes: B images · L decoder layers · N queries · C classes · S memory tokens · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from d3etr.config.base import MAXIMUM
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import SingleScaleDetector
from d3etr.detectors.conditional_detr import conditional_layers
from d3etr.detectors.groups import Decoded, GroupSize
from d3etr.detectors.heads import box_logits, predict_boxes
from d3etr.detectors.initialisation import (
    initialise_box_head,
    initialise_class_head,
    initialise_transformer,
)
from d3etr.detectors.position import SineEncoding
from d3etr.detectors.transformer import MLP, run_decoder
from d3etr.structures import Memory, ObjectQueries


class DABDETRConfig(DetectorConfig):
    """DAB-DETR."""

    name: Literal["dab_detr"] = "dab_detr"
    grid_temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 20.0
    """Longest period of the position encoding of grid cells; one of the official detectors has
    10."""
    inverse_sigmoid_epsilon: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    """A side or centre of an anchor this close to 0 or 1 moves from there; the official code's is
    1e-3, Hugging Face's 1e-5."""

    @property
    def reference_size(self) -> int:
        """Queries are anchor boxes."""
        return 4

    @property
    def takes_embedding(self) -> bool:
        """Embeddings are computed from anchors."""
        return False


class DABDecoder(nn.Module):
    """Conditional attention around anchor boxes that every layer moves.

    Args:
        config: uses width and what its layers use.
    """

    def __init__(self, config: DABDETRConfig) -> None:
        super().__init__()
        width = config.width
        self.layers = conditional_layers(config, nn.PReLU)
        self.query_scale = MLP((width, width, width))
        self.query_scale.requires_grad_(config.decoder_layers > 1)  # as in Conditional DETR
        self.size_head = MLP((width, width, 2))
        self.anchor_head = MLP((2 * width, width, width))
        self.norm = nn.LayerNorm(width)
        self.encoding = SineEncoding(width)

    def embed(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Query embedding [.., N, D] of anchors [.., N, 4] in [0, 1], and their encoding."""
        encoded = self.encoding.points(anchors)
        return self.anchor_head(encoded), encoded

    def look(self, hidden: Tensor, anchors: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Query embedding and spatial query of one layer, both [B or 1, N, D].

        The spatial query's x part is scaled by reference width over anchor width, its y part by
        the heights (equation 6): attention that fits the object's shape.
        """
        boxes = anchors.sigmoid()
        embedding, encoded = self.embed(boxes)
        width = embedding.shape[-1]
        spatial = encoded[..., :width]
        if index:
            spatial = spatial * self.query_scale(hidden)
        stretch = self.size_head(hidden).sigmoid() / boxes[..., 2:]
        y, x = spatial.chunk(2, -1)
        return embedding, torch.cat([y * stretch[..., 1:], x * stretch[..., :1]], -1)


class DABDETR(SingleScaleDetector):
    """Queries are anchor boxes; what attention adds to their states is computed from those.

    Args:
        config: architecture.
        classes: C.
    """

    config: DABDETRConfig
    config_class = DABDETRConfig

    def __init__(self, config: DABDETRConfig, classes: int) -> None:
        super().__init__(config, classes, True, config.grid_temperature)
        width = config.width
        self.decoder = DABDecoder(config)
        self.anchors = nn.Embedding(config.queries, 4)
        self.class_head = nn.Linear(width, classes)
        self.box_head = MLP((width, width, width, 4))
        for part in (self.encoder, self.decoder):
            initialise_transformer(part)
        initialise_class_head(self.class_head)
        initialise_box_head(self.box_head, 0.0)
        nn.init.uniform_(self.anchors.weight[:, :2], 0.05, 0.95)
        with torch.no_grad():
            self.anchors.weight[:, :2].logit_()
            self.anchors.weight[:, 2:] = config.box_size_bias

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The detector's own queries: anchors [N, 4] as logits.

        Their embedding [N, D], which the first layer computes from them, is for other decoders.
        """
        anchors = self.anchors.weight
        return ObjectQueries(self.decoder.embed(anchors.sigmoid())[0], anchors)

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; groups' embeddings are not used."""
        images, epsilon = memory.tokens.shape[0], self.config.inverse_sigmoid_epsilon
        anchors = self.references(groups)
        moved = [anchors]
        starts: list[Tensor] = []

        def aim(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            if index:
                # Detached as a start of the next move, not as what the last layer's boxes teach.
                before = moved[-1].detach() if index > 1 else anchors
                moved.append(box_logits(self.box_head, hidden, before, epsilon))
            starts.append(moved[-1].expand(images, -1, -1))
            return self.decoder.look(hidden, moved[-1].detach() if index else anchors, index)

        hidden = self.zero_states(anchors, memory)
        states, trace = run_decoder(self.decoder.layers, hidden, aim, memory, sizes, attention)
        normed = self.decoder.norm(torch.stack(states))
        boxes = predict_boxes(self.box_head, normed, torch.stack(starts), epsilon)
        logits = self.class_head(normed).float()
        return Decoded(logits, boxes, normed[-1], trace)
