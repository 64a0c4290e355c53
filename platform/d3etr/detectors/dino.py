"""DINO (Zhang et al., arXiv 2203.03605): Deformable DETR with three changes of how queries learn.

Mixed query selection: references are the encoder's best proposals, contents are learned. Look
forward twice: the loss of a layer's boxes also teaches the layer before. Contrastive denoising:
queries of noised ground truth. What is not in the paper follows the official code.

Shapes: B images · N queries · C classes · V feature levels · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import MAXIMUM, Size
from d3etr.detectors.deformable_attention import DeformableAttention, initialise_deformable
from d3etr.detectors.deformable_decoder import (
    References,
    Refinement,
    decode_around,
    deformable_layers,
)
from d3etr.detectors.denoising import DINOS
from d3etr.detectors.feature_levels import (
    BACKBONE_LEVELS,
    FeatureLevels,
    LevelPositions,
    encode_levels,
    on_levels,
    refuse_width,
    valid_ratios,
)
from d3etr.detectors.groups import Decoded, GroupSize
from d3etr.detectors.initialisation import initialise_refining_heads, initialise_transformer
from d3etr.detectors.position import SineEncoding
from d3etr.detectors.selection import SelectedQueriesConfig, SelectedQueriesDetector
from d3etr.detectors.transformer import MLP, Encoder
from d3etr.structures import ImageBatch, Memory, ObjectQueries

EPSILON = 1e-3
"""Of the official code's inverse sigmoid: a side this close to 0 or 1 moves from there."""


class DINOConfig(SelectedQueriesConfig):
    """DINO."""

    name: Literal["dino"] = "dino"
    queries: Size = 900
    """N, object queries: the most objects that can be found in an image."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training sets to 0."""
    levels: Annotated[int, Field(ge=1, le=16)] = 4
    """Feature levels: the backbone's last ``backbone_levels`` stages, and further ones that halve
    the resolution again. Official: 4, or 5 with all stages of the backbone."""
    backbone_levels: Annotated[int, Field(ge=1, le=8)] = BACKBONE_LEVELS
    """How many of the backbone's stages are feature levels, at most."""
    points: Size = 4
    """Places that each head samples on each level."""
    learned_content: bool = True
    """Mixed query selection; false: queries start from the selected tokens (pure selection)."""
    look_forward_twice: bool = True
    """A layer's boxes also teach the layer before, as in the official code."""
    shared_heads: bool = True
    """All decoder layers have one pair of heads, as in the official code; detrex gives each its
    own."""
    grid_temperature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 20.0
    """Longest period of the position encoding of grid cells; detrex has 10000."""
    grid_centred: bool = False
    """Cells are encoded by their centres, as detrex and Deformable DETR do it."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return self.levels

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """The focal loss, as official."""
        return {"class_weight": 1.0}

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        refuse_width(self.width, self.name)
        return self


class DINODecoder(nn.Module):
    """The layers with their heads, what makes embeddings of boxes, and the norm behind each layer.

    Args:
        config: uses decoder_layers, shared_heads and what its layers use.
        classes: C.
    """

    def __init__(self, config: DINOConfig, classes: int) -> None:
        super().__init__()
        width, depth = config.width, config.decoder_layers
        self.layers = deformable_layers(config, lambda: _attention(config))
        self.norm = nn.LayerNorm(width)
        self.encoding = SineEncoding(width)
        self.position_head = MLP((2 * width, width, width))
        heads = 1 if config.shared_heads else depth
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(heads))

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] cxcywh."""
        return self.position_head(self.encoding.points(boxes))  # type: ignore[no-any-return]


def _attention(config: DINOConfig) -> DeformableAttention:
    return DeformableAttention(config.width, config.heads, config.levels, config.points)


class DINO(SelectedQueriesDetector):
    """A deformable encoder, queries selected among its tokens, and a deformable decoder.

    As everywhere here, tokens under padding are never selected; the official code takes them for
    others that propose nothing.

    Args:
        config: architecture.
        classes: C.
    """

    config: DINOConfig
    config_class = DINOConfig
    denoising_details = DINOS

    def __init__(self, config: DINOConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.levels = FeatureLevels(config, self.backbone, config.backbone_levels)
        self.stride = self.levels.strides[0]
        self.position = LevelPositions(
            config.width, config.levels, config.grid_temperature, config.grid_centred
        )
        self.position.requires_grad_(config.encoder_layers > 0)  # the decoder has no use for it
        self.encoder = Encoder(config, lambda: _attention(config))
        self.decoder = DINODecoder(config, classes)
        self._initialise()

    def _initialise(self) -> None:
        for part in (self.encoder, self.decoder, self.proposals):
            initialise_transformer(part)
        for module in chain(self.encoder.modules(), self.decoder.modules()):
            if isinstance(module, DeformableAttention):
                initialise_deformable(module)
        decoder, proposals = self.decoder, self.proposals
        initialise_refining_heads(
            [*decoder.class_heads, proposals.class_head], [*decoder.box_heads, proposals.box_head]
        )
        if self.config.learned_content:
            nn.init.xavier_uniform_(self.query_content.weight)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each feature level, finest first."""
        return self.levels.strides

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder on all feature levels, and select the queries.

        Args:
            images: B padded images.
        """
        maps = self.backbone.pyramid(images.pixels, self.levels.stages)
        memory = encode_levels(maps, images.padding, self.levels, self.position, self.encoder)
        proposals, queries, scores = self.proposals(memory.tokens, memory.padding, memory.levels)
        return replace(memory, proposals=proposals, queries=queries, scores=scores)

    def embed(self, references: Tensor) -> Tensor:
        """As of ``SelectedQueriesDetector``."""
        return self.decoder.embed_boxes(references.sigmoid())

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; a group without content starts as its own queries do."""
        ratios = valid_ratios(memory.padding, memory.levels)

        def embed(references: Tensor) -> Tensor:
            # As in the official code, of boxes relative to the finest level with its padding.
            boxes = on_levels(references.sigmoid(), ratios, len(memory.levels))[:, :, 0]
            return self.decoder.embed_boxes(boxes)

        refinement: Refinement = "twice" if self.config.look_forward_twice else "detached"
        references = References(self.references(groups), embed, refinement, EPSILON)
        hidden, norm = self.contents(memory, groups), self.decoder.norm
        return decode_around(self.decoder, hidden, references, memory, sizes, attention, norm)
