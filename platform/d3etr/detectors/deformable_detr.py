"""Deformable DETR (Zhu et al., arXiv 2010.04159), with box refinement and two stages on request.

Shapes: B images · L decoder layers · N queries · C classes · S memory tokens of all feature
levels · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import Size
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.deformable_attention import (
    DeformableAttention,
    initialise_deformable,
)
from d3etr.detectors.deformable_decoder import (
    References,
    Refinement,
    decode_around,
    deformable_layers,
)
from d3etr.detectors.feature_levels import (
    FeatureLevels,
    LevelPositions,
    encode_levels,
    refuse_width,
)
from d3etr.detectors.groups import Decoded, GroupSize, side_by_side
from d3etr.detectors.initialisation import (
    initialise_box_head,
    initialise_class_head,
    initialise_transformer,
)
from d3etr.detectors.proposals import Proposals
from d3etr.detectors.transformer import MLP, Encoder
from d3etr.structures import Grids, ImageBatch, Memory, ObjectQueries


class DeformableDETRConfig(DetectorConfig):
    """Deformable DETR."""

    name: Literal["deformable_detr"] = "deformable_detr"
    levels: Annotated[int, Field(ge=1, le=16)] = 4
    """Feature levels; up to three are the backbone's last stages, each further one halves the
    resolution again."""
    points: Size = 4
    """Places that each head samples on each level."""
    box_refinement: bool = False
    """Every decoder layer moves the boxes of the one before."""
    two_stage: bool = False
    """The encoder proposes the boxes that queries start from; needs box_refinement."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return self.levels

    @property
    def reference_size(self) -> int:
        """Queries have reference points, or boxes where the encoder proposes them."""
        return 4 if self.two_stage else 2

    @property
    def queries_need_images(self) -> bool:
        """Two-stage queries are each image's own."""
        return self.two_stage

    @property
    def sampling_parts(self) -> frozenset[str]:
        """Sampling offsets and reference points."""
        return frozenset({"offsets", "reference_head"})

    @property
    def takes_content(self) -> bool:
        """Queries have a learned content beside their embedding."""
        return True

    @property
    def derives_references(self) -> bool:
        """A linear map makes reference points from embeddings."""
        return not self.two_stage

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement: set it to true, as in the paper")
        refuse_width(self.width, self.name)
        return self


def _attention(config: DeformableDETRConfig) -> DeformableAttention:
    return DeformableAttention(config.width, config.heads, config.levels, config.points)


class DeformableDecoder(nn.Module):
    """The layers with their heads: of their own with box refinement, else one pair for all.

    Args:
        config: uses decoder_layers, box_refinement and what its layers use.
        classes: C.
    """

    def __init__(self, config: DeformableDETRConfig, classes: int) -> None:
        super().__init__()
        width, depth = config.width, config.decoder_layers
        self.layers = deformable_layers(config, lambda: _attention(config))
        heads = depth if config.box_refinement else 1
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(heads))


class DeformableDETR(DetectionTransformer):
    """Queries sample few places around their references, on several feature levels.

    Args:
        config: architecture.
        classes: C.
    """

    config: DeformableDETRConfig
    config_class = DeformableDETRConfig

    def __init__(self, config: DeformableDETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        width = config.width
        self.levels = FeatureLevels(config, self.backbone)
        self.stride = self.levels.strides[0]
        self.position = LevelPositions(width, config.levels)
        self.position.requires_grad_(config.encoder_layers > 0)  # the decoder has no use for it
        self.encoder = Encoder(config, lambda: _attention(config))
        self.decoder = DeformableDecoder(config, classes)
        self.proposals = Proposals(config, classes) if config.two_stage else None
        if self.proposals is None:
            self.query_embedding = nn.Embedding(config.queries, width)
            self.query_content = nn.Embedding(config.queries, width)
            self.reference_head = nn.Linear(width, 2)
        self._initialise(config)

    def _initialise(self, config: DeformableDETRConfig) -> None:
        for part in (self.encoder, self.decoder):
            initialise_transformer(part)
        heads = [*self.decoder.class_heads], [*self.decoder.box_heads]
        if self.proposals is None:
            nn.init.xavier_uniform_(self.reference_head.weight)
            nn.init.zeros_(self.reference_head.bias)
        else:
            initialise_transformer(self.proposals)
            heads = [*heads[0], self.proposals.class_head], [*heads[1], self.proposals.box_head]
        for module in chain(self.encoder.modules(), self.decoder.modules()):
            if isinstance(module, DeformableAttention):
                initialise_deformable(module)
        for class_head in heads[0]:
            initialise_class_head(class_head)
        for index, box_head in enumerate(heads[1]):
            # Only what starts from points needs a size; later layers move whole boxes.
            first = index == 0 and self.proposals is None
            initialise_box_head(box_head, config.box_size_bias if first else 0.0)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Likewise; a dilated stage (DC5) has the stride of the one before."""
        return self.levels.strides

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder on all feature levels.

        Args:
            images: B padded images.
        """
        maps = self.backbone.pyramid(images.pixels, self.levels.stages)
        memory = encode_levels(maps, images.padding, self.levels, self.position, self.encoder)
        if self.proposals is None:
            return memory
        proposals, logits = self.proposals(memory.tokens, memory.padding, memory.levels)
        return replace(memory, proposals=proposals, proposal_logits=logits)

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The main group: learned, or the best proposals of each image in ``memory``."""
        if self.proposals is not None:
            queries = self.proposals.object_queries(memory)
            assert memory is not None
            return replace(queries, grids=Grids(memory.levels, self.level_strides))
        embedding = self.query_embedding.weight
        return ObjectQueries(
            embedding, self.derive_references(embedding), self.query_content.weight
        )

    def derive_references(self, embedding: Tensor) -> Tensor:
        """[.., N, D] embeddings to reference points [.., N, 2] as logits."""
        with torch.autocast(embedding.device.type, enabled=False):
            return self.reference_head(embedding.float())  # type: ignore[no-any-return]

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; a group without content starts from zeros.

        With box refinement every layer starts from the boxes of the one before, else all from one
        reference. Attention maps are those of what was sampled.
        """
        embedding = side_by_side([group.embedding for group in groups])
        contents = [
            torch.zeros_like(group.embedding) if group.content is None else group.content
            for group in groups
        ]
        refinement: Refinement = "detached" if self.config.box_refinement else None
        aim = References(self.references(groups), lambda _: embedding, refinement)
        return decode_around(self.decoder, side_by_side(contents), aim, memory, sizes, attention)
