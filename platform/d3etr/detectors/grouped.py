"""What LW-DETR and RF-DETR are: learned contents at selected boxes, and copies of them in training.

(Chen et al., arXiv 2406.03459.) The encoder is the backbone. Queries are the tokens of the highest
class score as boxes alone: contents are learned, and so are moves of the boxes, from which all
layers start. Boxes are moved by shares of their own sides. In training there are copies of the
queries with selections of their own (Group DETR, arXiv 2207.13085). What differs between kinds is
the backbone, and the norm of the projector behind it.

Shapes: B images · L decoder layers · G groups of queries in training · N queries of a group · C
classes · S memory tokens of all levels · V levels · D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import Layers, Size
from d3etr.detectors.backbones import BlockMaps, store_channels_last
from d3etr.detectors.base import DetectionTransformer, sampled_memory
from d3etr.detectors.box_selection import BoxSelection
from d3etr.detectors.deformable_attention import DeformableAttention, initialise_deformable
from d3etr.detectors.deformable_decoder import deformable_layers
from d3etr.detectors.feature_levels import BACKBONE_LEVELS, on_levels, valid_ratios
from d3etr.detectors.groups import Decoded, GroupSize, side_by_side
from d3etr.detectors.heads import moved_boxes
from d3etr.detectors.initialisation import (
    initialise_class_head,
    initialise_last,
    initialise_transformer,
)
from d3etr.detectors.position import SineEncoding
from d3etr.detectors.projector import Norm, Projector
from d3etr.detectors.proposals import token_boxes
from d3etr.detectors.selected_queries import SelectedConfig
from d3etr.detectors.transformer import MLP, run_decoder
from d3etr.structures import (
    MAIN,
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

COPIES = "copies"
"""Name of the group of copies and its losses."""
EDGE = 1e-5
"""How close to 0 and 1 boxes come as logits, for decoders that start from those."""


class GroupedConfig(SelectedConfig):
    """Detectors of learned contents at selected boxes: LW-DETR and its kin."""

    encoder_layers: Annotated[int, Field(ge=0, le=0)] = 0
    """None: its encoder is the backbone."""
    decoder_layers: Layers = 3
    """L, layers of the decoder; official: 3, RF-DETR's 2 to 4."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training sets to 0."""
    cross_heads: Size = 16
    """Heads of the attention to the memory; ``width`` must be a multiple of their number."""
    points: Size = 2
    """Places that each head samples on each level."""
    scales: Annotated[
        tuple[Annotated[float, Field(gt=0, le=2)], ...],
        Field(min_length=1, max_length=BACKBONE_LEVELS),
    ] = (1.0,)
    """Resolution of each feature level over the backbone's: 2, 1 or 0.5, finest first."""
    expansion: Annotated[float, Field(gt=0, le=8)] = 0.5
    """Channels within the projector's fusions, as a factor on ``width``."""
    projector_blocks: Layers = 3
    """Pairs of convolutions in each fusion."""
    groups: Annotated[int, Field(ge=1, le=100)] = 13
    """Groups of queries in training, which see nothing of each other; one of them is used
    afterwards."""

    @property
    def feature_levels(self) -> int:
        """Feature levels that cross-attention maps run over."""
        return len(self.scales)

    @property
    def cross_attention_heads(self) -> int:
        """Heads of the decoder's attention to the memory."""
        return self.cross_heads

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """The IoU-aware cross entropy, as official."""
        return {"class_loss": "ia_bce", "class_weight": 1.0}

    @property
    def projector_norm(self) -> Norm:
        """Of the projector's convolutions."""
        raise NotImplementedError

    @property
    def learns_content(self) -> bool:
        """Of the queries' own."""
        return True

    @property
    def auxiliary_content(self) -> Literal["own", "adapted", "learned"]:
        """A student's decoder knows its own vectors."""
        return "learned"

    @model_validator(mode="after")
    def _scales_and_heads_fit(self) -> Self:
        falling = all(one > other for one, other in pairwise(self.scales))
        if not falling or not {*self.scales} <= {0.5, 1.0, 2.0}:
            raise ValueError(
                f"scales are {list(self.scales)}: expected some of 2, 1 and 0.5, finest first"
            )
        if self.width % self.cross_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of cross_heads ({self.cross_heads})"
            )
        if int(self.width * self.expansion) < 1:
            raise ValueError(f"expansion {self.expansion:g} leaves the projector no channels")
        return self


class GroupedDecoder(nn.Module):
    """The layers, the norm behind each of them, and heads that all share.

    Args:
        config: uses decoder_layers and what its layers use.
        classes: C.
    """

    def __init__(self, config: GroupedConfig, classes: int) -> None:
        super().__init__()
        width, levels = config.width, config.feature_levels
        self.layers = deformable_layers(
            config, lambda: DeformableAttention(width, config.cross_heads, levels, config.points)
        )
        self.norm = nn.LayerNorm(width)
        self.encoding = SineEncoding(width)
        self.position_head = MLP((2 * width, width, width))
        self.class_heads = nn.ModuleList([nn.Linear(width, classes)])
        self.box_heads = nn.ModuleList([MLP((width, width, width, 4))])

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] cxcywh."""
        return self.position_head(self.encoding.points(boxes))  # type: ignore[no-any-return]

    def predict(self, states: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [L, B, N, C] and boxes [L, B, N, 4] of all layers' states [L, B, N, D]."""
        logits = self.class_heads[0](states).float()
        with torch.autocast(states.device.type, enabled=False):
            return logits, moved_boxes(boxes, self.box_heads[0](states.float()))


class GroupedDetector(DetectionTransformer):
    """A projected backbone, queries selected among its tokens, and a deformable decoder.

    Args:
        config: architecture.
        classes: C.
    """

    config: GroupedConfig

    def __init__(self, config: GroupedConfig, classes: int) -> None:
        super().__init__(config, classes)
        backbone, scales, width = self.backbone, config.scales, config.width
        channels = backbone.stage_channels[-1:]
        if isinstance(backbone, BlockMaps):
            channels = backbone.map_channels
        norm = config.projector_norm
        self.encoder = Projector(
            channels, scales, width, config.expansion, config.projector_blocks, norm
        )
        self._strides = tuple(round(backbone.stride / scale) for scale in scales)
        self.stride = self._strides[0]
        self.proposals = nn.ModuleList(BoxSelection(config, classes) for _ in range(config.groups))
        self.query_content = nn.Embedding(config.groups * config.queries, width)
        self.reference_moves = nn.Embedding(config.groups * config.queries, 4)
        self.decoder = GroupedDecoder(config, classes)
        self._initialise()

    def _initialise(self) -> None:
        for part in (self.decoder, self.proposals):
            initialise_transformer(part)
            for name, module in part.named_modules():
                if isinstance(module, DeformableAttention):
                    initialise_deformable(module)
                elif isinstance(module, MLP) and "box_head" in name:
                    initialise_last(module)  # boxes start from where they are
                elif isinstance(module, nn.Linear) and "class_head" in name:
                    initialise_class_head(module)
        nn.init.zeros_(self.reference_moves.weight)
        store_channels_last(self.encoder)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each feature level, finest first."""
        return self._strides

    def encode(self, images: ImageBatch) -> Memory:
        """Run backbone and projector, and select the queries: of all groups in training.

        Args:
            images: B padded images.
        """
        height, width = images.pixels.shape[-2:]
        maps = [  # an enlarged map may have a cell more than its stride asks for
            part[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for part, stride in zip(
                self.encoder(self._maps(images.pixels)), self._strides, strict=True
            )
        ]
        memory = sampled_memory(maps, images.padding)
        proposals, queries, scores = self._select(memory.tokens, memory.padding, memory.levels)
        return replace(memory, proposals=proposals, queries=queries, scores=scores)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """What the backbone gives of one stride."""
        if isinstance(self.backbone, BlockMaps):
            return self.backbone.maps(pixels)
        return self.backbone.pyramid(pixels, 1)

    def _select(
        self, tokens: Tensor, padding: Tensor | None, levels: Levels
    ) -> tuple[DecoderOutputs, ObjectQueries, TokenScores]:
        """What selected tokens say [G, B, N, ..], and the queries [B, G N, ..] that start there.

        And what the first group, which is used after training, says about all tokens.
        """
        start, silent = token_boxes(tokens, padding, levels)
        start = start.masked_fill(silent[..., None], 0.0)  # as official: a box without a size
        heard = tokens.masked_fill(silent[..., None], 0.0)
        used = [*self.proposals][: self.config.groups if self.training else 1]
        found = [selection(heard, start, silent) for selection in used]
        logits, boxes, places = (torch.stack(parts) for parts in [*zip(*found, strict=True)][:3])
        proposed = DecoderOutputs(logits, boxes, levels=levels, padding=padding)
        content, moves = (
            table.weight.view(self.config.groups, self.config.queries, -1)[
                : len(used), : boxes.shape[2]
            ].flatten(0, 1)
            for table in (self.query_content, self.reference_moves)
        )
        content = content.expand(tokens.shape[0], -1, -1)
        reference = moved_boxes(boxes.detach().transpose(0, 1).flatten(1, 2), moves.float())
        queries = ObjectQueries(
            content,
            reference.logit(EDGE),
            content,
            places.transpose(0, 1).flatten(1),
            Grids(levels, self._strides),
            blocks=len(used),
            see_first=False,
            reference_boxes=reference,
        )
        return proposed, queries, TokenScores(found[0][3], silent)

    def object_queries(self, memory: Memory | None = None) -> ObjectQueries:
        """The main group: of the tokens of each image in ``memory`` that were selected.

        Their embedding [B, N, D] is for other decoders.
        """
        if memory is None or memory.queries is None:
            raise ValueError("this detector's queries are in the memory that 'encode' returned")
        queries = _blocks(memory.queries, 0, 1)
        assert queries.reference_boxes is not None
        embedding = self.decoder.embed_boxes(queries.reference_boxes)
        return replace(queries, embedding=embedding, blocks=0, see_first=True)

    def training_groups(self, memory: Memory, targets: Targets, step: int) -> dict[str, QueryGroup]:
        """The main group as one of G that learn each object, and its copies side by side."""
        groups = self.config.groups
        if groups == 1 or not self.training:
            return {}
        assert memory.queries is not None
        return {
            MAIN: QueryGroup(self.object_queries(memory), copies=groups),
            COPIES: QueryGroup(_blocks(memory.queries, 1, groups), copies=groups),
        }

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; a group without content starts from learned vectors."""
        images, decoder = memory.tokens.shape[0], self.decoder
        boxes = self._boxes(groups).expand(images, -1, -1)
        ratios = valid_ratios(memory.padding, memory.levels)
        place = on_levels(boxes, ratios, len(memory.levels))
        embedding = decoder.embed_boxes(place[:, :, 0])
        contents = [
            self._learned(group) if group.content is None else group.content for group in groups
        ]
        hidden = side_by_side(contents).expand(images, -1, -1)
        states, trace = run_decoder(
            decoder.layers, hidden, lambda *_: (embedding, place), memory, sizes, attention
        )
        normed = decoder.norm(torch.stack(states))
        return Decoded(*decoder.predict(normed, boxes), normed[-1], trace)

    def _boxes(self, groups: Sequence[ObjectQueries]) -> Tensor:
        """[B or 1, N, 4] reference boxes of all groups side by side, float32."""
        parts = [
            self.references([group]).sigmoid()
            if group.reference_boxes is None
            else group.reference_boxes
            for group in groups
        ]
        return side_by_side(parts).float()

    def _learned(self, group: ObjectQueries) -> Tensor:
        """[N, D] contents of the detector's own for a group without."""
        rows = torch.arange(group.count, device=self.query_content.weight.device)
        return self.query_content(rows % self.config.queries)  # type: ignore[no-any-return]


def _blocks(queries: ObjectQueries, first: int, end: int) -> ObjectQueries:
    """The blocks of queries from ``first`` until before ``end``."""
    size = queries.count // queries.blocks
    begin, count = first * size, (end - first) * size
    assert queries.place is not None
    return replace(
        queries.map(lambda part: part.narrow(-2, begin, count)),
        place=queries.place.narrow(1, begin, count),
        grids=queries.grids,
        blocks=end - first,
        see_first=queries.see_first,
    )
