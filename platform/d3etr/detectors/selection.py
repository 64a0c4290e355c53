"""Detectors whose queries start at the encoder's tokens of the highest class score.

The reference of a query is the box that its token proposes. Its content is the token (RT-DETR, Zhao
et al., arXiv 2304.08069, section 4.3) or a learned vector (DINO's mixed query selection, Zhang et
al., arXiv 2203.03605, section 3.4). What differs between kinds is the encoder and the decoder.

Shapes: B images · N queries · C classes · S memory tokens of all feature levels · D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import Layers, Size
from d3etr.detectors.backbones import store_channels_last
from d3etr.detectors.base import DetectionTransformer, sampled_memory
from d3etr.detectors.denoising import DENOISING, DenoisingConfig, touching
from d3etr.detectors.feature_levels import BACKBONE_LEVELS
from d3etr.detectors.groups import side_by_side
from d3etr.detectors.heads import box_logits
from d3etr.detectors.hybrid_encoder import HybridEncoder
from d3etr.detectors.initialisation import initialise_refining_heads, initialise_transformer
from d3etr.detectors.places import tokens_at_places
from d3etr.detectors.proposals import TokenHeads, first_boxes
from d3etr.detectors.selected_queries import SelectedConfig
from d3etr.detectors.transformer import MLP, Activation, relu
from d3etr.errors import UserError
from d3etr.structures import (
    DecoderOutputs,
    Grids,
    ImageBatch,
    Levels,
    Memory,
    ObjectQueries,
    QueryGroup,
    Targets,
    TokenScores,
)


class SelectedQueriesConfig(SelectedConfig):
    """Detectors whose encoder selects the queries by their classes, and that denoise."""

    learned_content: bool = False
    """Queries start from learned vectors, not from the encoder's tokens."""
    denoising: DenoisingConfig = DenoisingConfig()
    """Noised ground truth that the decoder learns to restore, in training only."""

    @property
    def decoder_activation(self) -> Activation:
        """What is between linear layers of the decoder and of heads."""
        return relu

    @property
    def projects_tokens(self) -> bool:
        """Whether tokens are projected and normed before the heads that select among them."""
        return True

    @property
    def learns_content(self) -> bool:
        """With ``learned_content``."""
        return self.learned_content

    @property
    def auxiliary_content(self) -> Literal["own", "adapted", "learned"]:
        """A student's own encoder says what is at the teacher's place."""
        return "own"


class SelectingConfig(SelectedQueriesConfig):
    """Detectors of a hybrid encoder whose tokens become the queries: RT-DETR and its kin."""

    encoder_layers: Annotated[int, Field(ge=0, le=100)] = 1
    """Layers of attention within the coarsest level; 0 leaves it out."""
    decoder_layers: Layers = 6
    """L, layers of the decoder; official: 3 (R18), 4 (R34) and 6."""
    feedforward: Size = 1024
    """Channels between the two linear maps of each decoder layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training sets to 0."""
    levels: Annotated[int, Field(ge=1, le=BACKBONE_LEVELS)] = 3
    """Feature levels: the backbone's last stages."""
    encoder_width: Size = 256
    """Channels of the encoder; the decoder has ``width``. Official: 256, with ResNet-101 384."""
    encoder_feedforward: Size = 1024
    """Channels between the two linear maps of the encoder's attention layers."""
    expansion: Annotated[float, Field(gt=0, le=8)] = 1.0
    """Channels within the encoder's fusions, as a factor on its width; 0.5 with ResNet-18, 34."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return self.levels

    @property
    def stages(self) -> int:
        """How many of the backbone's last stages the encoder reads."""
        return self.levels

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """The varifocal loss, as official."""
        return {"class_loss": "varifocal", "class_weight": 1.0}

    @model_validator(mode="after")
    def _heads_divide_encoder_width(self) -> Self:
        if self.encoder_width % self.heads or self.encoder_width % 4:
            raise ValueError(
                f"encoder_width {self.encoder_width} must be a multiple of heads ({self.heads}) "
                "and of 4 (position encoding)"
            )
        if int(self.encoder_width * self.expansion) < 1:
            raise ValueError(f"expansion {self.expansion:g} leaves the encoder no channels")
        return self


class Selection(TokenHeads):
    """Scores every token by its classes; the best ones propose boxes.

    Args:
        config: uses width, queries, decoder_activation and projects_tokens.
        classes: C.
    """

    def __init__(self, config: SelectedQueriesConfig, classes: int) -> None:
        super().__init__(config, classes, config.decoder_activation, config.projects_tokens)

    def forward(
        self, tokens: Tensor, padding: Tensor | None, levels: Levels
    ) -> tuple[DecoderOutputs, ObjectQueries, TokenScores]:
        """What the selected tokens say, the queries that start from them, and all tokens' scores.

        Returns:
            Logits [1, B, N, C] and boxes [1, B, N, 4], which learn from their own loss; the
            queries, through which no gradient passes: contents [B, N, D] (as embedding, too),
            references [B, N, 4] and places [B, N]; and the scores that they were selected by.
        """
        start, silent = first_boxes(tokens, padding, levels)
        states = self.states(tokens.masked_fill(silent[..., None], 0.0))
        scores: Tensor = self.class_head(states)
        of_all = TokenScores(scores, silent)
        best = scores.detach().amax(-1)
        if padding is not None:
            best = best.masked_fill(padding, float("-inf"))
        place = self.best(best)
        start = start.masked_fill(silent[..., None], float("inf"))
        start, states, scores = (at_places(x, place) for x in (start, states, scores))
        references = box_logits(self.box_head, states, start)
        references = references.where(start.isfinite(), start)  # what proposes nothing stays so
        proposed = DecoderOutputs(
            scores.float()[None], references.sigmoid()[None], levels=levels, padding=padding
        )
        queries = ObjectQueries(states, references, states, place)
        return proposed, queries.detach(), of_all


def at_places(values: Tensor, place: Tensor) -> Tensor:
    """Values [B, N, X] of [B or 1, S, X] at the tokens [B, N]."""
    values = values.expand(place.shape[0], -1, -1)
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[-1]))


class SelectingDecoder(nn.Module):
    """Layers with heads of their own, and what makes embeddings of boxes.

    Args:
        config: uses width and decoder_activation.
    """

    layers: nn.ModuleList
    class_heads: nn.ModuleList
    box_heads: nn.ModuleList

    def __init__(self, config: SelectingConfig) -> None:
        super().__init__()
        width = config.width
        self.position_head = MLP((4, 2 * width, width), config.decoder_activation)

    def embed(self, references: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] before the sigmoid."""
        return self.embed_boxes(references.sigmoid())

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] cxcywh."""
        return self.position_head(boxes)  # type: ignore[no-any-return]


class SelectedQueriesDetector(DetectionTransformer):
    """Queries selected among an encoder's tokens, and denoising queries in training.

    Subclasses encode, with ``proposals`` and their queries in the memory, and decode.

    Args:
        config: architecture.
        classes: C.
    """

    config: SelectedQueriesConfig

    def __init__(self, config: SelectedQueriesConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.proposals = Selection(config, classes)
        if config.learned_content:
            self.query_content = nn.Embedding(config.queries, config.width)
        if config.denoising.queries:
            self.label_embedding = nn.Embedding(classes + 1, config.width, padding_idx=classes)

    @abstractmethod
    def embed(self, references: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] before the sigmoid."""

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The main group: the tokens of each image in ``memory`` that were selected.

        Their embedding [B, N, D], which the first layer computes from references, is for other
        decoders.
        """
        if memory is None or memory.queries is None:
            raise ValueError("this detector's queries are in the memory that 'encode' returned")
        queries = memory.queries
        queries = replace(queries, grids=Grids(memory.levels, self.level_strides))
        content = self._content(memory, queries) if self.config.learned_content else queries.content
        assert queries.reference_logits is not None
        embedding = self.embed(queries.reference_logits)
        queries = replace(queries, embedding=embedding, content=content)
        if self.label_embedding is None or not self.training:
            return queries
        return touching(queries, self.label_embedding.weight)

    def training_groups(self, memory: Memory, targets: Targets, step: int) -> dict[str, QueryGroup]:
        """Denoising queries; see ``DetectionTransformer``."""
        if self.label_embedding is None or not self.training:
            return {}
        return {DENOISING: self.denoising_queries(targets, self.config.denoising, step)}

    def contents(self, memory: Memory, groups: Sequence[ObjectQueries]) -> Tensor:
        """[B, N, D] of all groups; one without starts from what queries of its own start from."""
        return side_by_side(
            [
                self._content(memory, group) if group.content is None else group.content
                for group in groups
            ]
        )

    def _content(self, memory: Memory, group: ObjectQueries) -> Tensor:
        """[B, N, D] what queries of this detector's own start from, for a group without content."""
        images = memory.tokens.shape[0]
        if self.config.learned_content:
            rows = torch.arange(group.count, device=memory.tokens.device)
            learned: Tensor = self.query_content(rows % self.config.queries)
            return learned.expand(images, -1, -1)
        reference = self.references([group]).expand(images, -1, -1)
        own = Grids(memory.levels, self.level_strides)
        tokens = tokens_at_places(memory, own, group, reference)
        return self.proposals.states(tokens).detach()


class SelectingDetector(SelectedQueriesDetector):
    """A hybrid encoder, queries selected among its tokens, and denoising queries in training.

    Subclasses set ``encoder``, ``levels`` (what brings its maps to the decoder's width) and
    ``decoder``, and decode.

    Args:
        config: architecture.
        classes: C.
    """

    config: SelectingConfig
    encoder: HybridEncoder
    levels: nn.ModuleList
    decoder: SelectingDecoder

    def __init__(self, config: SelectingConfig, classes: int) -> None:
        super().__init__(config, classes)
        strides = self.backbone.stage_strides[-config.stages :]
        if len(strides) < config.stages:
            raise UserError(
                f"detector '{config.name}' reads {config.stages} levels of its backbone, and "
                f"{config.backbone.name} gives strides {[*strides]} only: set levels to "
                f"{len(strides)}, choose a backbone with more stages (such as resnet50vd or "
                "timm/hgnetv2_b0), or a detector that makes coarser levels of its own (such as "
                "'dino', 'deformable_detr' or 'rf_detr')"
            )
        coarser = range(1, config.levels - config.stages + 1)
        self._strides = (*strides, *(strides[-1] * 2**level for level in coarser))
        self.stride = self._strides[0]

    def initialise(self) -> None:
        """Draw the weights, once all parts are there."""
        for part in (self.encoder, self.decoder, self.proposals):
            initialise_transformer(part)
        decoder, proposals = self.decoder, self.proposals
        initialise_refining_heads(
            [*decoder.class_heads, proposals.class_head], [*decoder.box_heads, proposals.box_head]
        )
        store_channels_last(self)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each feature level, finest first."""
        return self._strides

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and encoder, and select the queries.

        Args:
            images: B padded images.
        """
        maps = self.backbone.pyramid(images.pixels, self.config.stages)
        maps = self.encoder(maps, images.padding)
        maps = [project(part) for project, part in zip(self.levels, maps, strict=True)]
        memory = sampled_memory(maps, images.padding)
        proposals, queries, scores = self.proposals(memory.tokens, memory.padding, memory.levels)
        return replace(memory, proposals=proposals, queries=queries, scores=scores)

    def embed(self, references: Tensor) -> Tensor:
        """As of ``SelectedQueriesDetector``."""
        return self.decoder.embed(references)
