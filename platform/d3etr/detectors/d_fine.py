"""D-FINE (Peng et al., arXiv 2410.13842).

RT-DETR's queries and encoder, whose decoder refines distributions over the edges of one box instead
of the box itself.

Shapes: B images · L decoder layers · N queries · C classes · K bins · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3etr.config.base import MAXIMUM, Layers, Size
from d3etr.detectors.attention import SelfAttention
from d3etr.detectors.conv_norm import ConvNorm, silu
from d3etr.detectors.deformable_attention import (
    UnevenDeformableAttention,
    initialise_deformable,
)
from d3etr.detectors.deformable_decoder import DeformableDecoderLayer
from d3etr.detectors.feature_levels import on_levels, valid_ratios
from d3etr.detectors.groups import Decoded, GroupSize
from d3etr.detectors.heads import box_logits
from d3etr.detectors.hybrid_encoder import CSPRepLayer, EncoderBlocks, HybridEncoder
from d3etr.detectors.initialisation import initialise_last
from d3etr.detectors.selection import SelectingConfig, SelectingDecoder, SelectingDetector
from d3etr.detectors.transformer import MLP, Activation, relu, run_decoder
from d3etr.edge_distributions import BoxDistributions
from d3etr.matching.edges import bin_distances, mean_distances, moved_edges
from d3etr.structures import Memory, ObjectQueries

STEEPEST = 4
"""Bins of the highest probability whose heights say how sure a box is."""
QUALITY_WIDTH = 64
FARTHEST = 10.0
"""Query embeddings are kept within plus and minus this."""


class DFINEConfig(SelectingConfig):
    """D-FINE."""

    name: Literal["d_fine"] = "d_fine"
    points: Size | Annotated[tuple[Size, ...], Field(min_length=1)] = (3, 6, 3)
    """Places that each head samples on each level: one number for each, or one for all."""
    encoder_blocks: Layers = 3
    """RepVGG blocks of each of the encoder's stages; official: 1 (S), 2 (N, M) and 3 (L, X)."""
    bins: Annotated[int, Field(ge=4, le=1024)] = 32
    """An edge's distribution has one more; even."""
    bound: Annotated[float, Field(gt=0, le=MAXIMUM)] = 0.5
    """How far edges move at most, in sides of the first box; the outermost bins twice as far."""
    curvature: Annotated[float, Field(gt=0, le=MAXIMUM)] = 4.0
    """How much finer bins are around 0."""

    activation: Literal["relu", "silu"] = "relu"
    """Between linear layers of the decoder and of heads: D-FINE's, or DEIM's silu."""

    @property
    def decoder_activation(self) -> Activation:
        """What is between linear layers of the decoder and of heads."""
        return silu if self.activation == "silu" else relu

    @property
    def level_points(self) -> tuple[int, ...]:
        """Places on each level."""
        return (self.points,) * self.levels if isinstance(self.points, int) else self.points

    @property
    def box_heads(self) -> int:
        """One for each layer, or one for all."""
        return self.decoder_layers

    @property
    def within(self) -> int:
        """Channels of the stages within the encoder's fusions."""
        return round(self.expansion * self.encoder_width // 2)

    @property
    def embeds_refined(self) -> bool:
        """Whether each layer's query embeddings are those of the boxes that it starts from."""
        return True

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """As of RT-DETR's kin; boxes learn over the union of all layers' matches, as official."""
        return {**super().criterion_defaults, "union_matching": True}

    @property
    def edge_bins(self) -> Mapping[str, float]:
        """Of the distributions of every edge."""
        return {"bins": self.bins, "bound": self.bound, "curvature": self.curvature}

    @model_validator(mode="after")
    def _bins_and_points_fit(self) -> Self:
        if self.bins % 2:
            raise ValueError(f"bins is {self.bins}: expected an even number")
        if not self.within:
            raise ValueError(f"expansion {self.expansion:g} leaves the encoder no channels")
        if len(self.level_points) != self.levels:
            raise ValueError(
                f"points has {len(self.level_points)} numbers for {self.levels} levels: give one "
                "for each, or a single one"
            )
        return self


class ELANLayer(nn.Module):
    """Fuses maps: two CSP stages one after the other, and what comes in between (RepNCSPELAN4).

    Args:
        inputs: channels of what comes in.
        width: D', of the result.
        within: channels of the stages.
        blocks: RepVGG blocks of each.
        mixes: a 3x3 convolution behind each stage; without them it is DEIMv2's RepNCSPELAN5.
    """

    def __init__(
        self, inputs: int, width: int, within: int, blocks: int, mixes: bool = True
    ) -> None:
        super().__init__()

        def mix() -> nn.Module:
            return ConvNorm(within, within, 3, activation=silu) if mixes else nn.Identity()

        self.enter = ConvNorm(inputs, 2 * width, activation=silu)
        self.stage1 = CSPRepLayer(width, within, within, blocks)
        self.mix1 = mix()
        self.stage2 = CSPRepLayer(within, within, within, blocks)
        self.mix2 = mix()
        self.leave = ConvNorm(2 * width + 2 * within, width, activation=silu)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, D', h, w]."""
        x = self.enter(x)
        first = self.mix1(self.stage1(x.chunk(2, 1)[1]))
        second = self.mix2(self.stage2(first))
        return self.leave(torch.cat([x, first, second], 1))  # type: ignore[no-any-return]


def elan_blocks(config: DFINEConfig) -> EncoderBlocks:
    """What D-FINE's encoder fuses levels by."""
    width = config.encoder_width
    return EncoderBlocks(
        lambda: ConvNorm(width, width),
        lambda: ELANLayer(2 * width, width, config.within, config.encoder_blocks),
        lambda: halving(width),
    )


def halving(width: int) -> nn.Module:
    """[B, D', h, w] to half the resolution, rounded up: channels first, then space (SCDown)."""
    return nn.Sequential(ConvNorm(width, width), ConvNorm(width, width, 3, 2, groups=width))


class Gate(nn.Module):
    """Weighs states against what they have read.

    Args:
        width: D.
        norm: of the result; None: a layer norm.
    """

    def __init__(self, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(width) if norm is None else norm

    def forward(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """[B, N, D] of the same."""
        kept, read = self.gate(torch.cat([hidden, mixed], -1)).sigmoid().chunk(2, -1)
        return self.norm(kept * hidden + read * mixed)  # type: ignore[no-any-return]


class DFINELayer(DeformableDecoderLayer):
    """A gate takes the place of the residual around the cross-attention.

    Args:
        config: of the detector.
    """

    def __init__(self, config: DFINEConfig) -> None:
        attention = UnevenDeformableAttention(config.width, config.heads, config.level_points)
        super().__init__(config, SelfAttention(config), attention, config.decoder_activation)
        self.cross_norm = Gate(config.width)

    def join(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """As of ``DecoderLayer``."""
        return self.cross_norm(hidden, mixed)  # type: ignore[no-any-return]


class DFINEDecoder(SelectingDecoder):
    """The layers with their heads.

    Args:
        config: uses decoder_layers, bins and what its layers use.
        classes: C.
    """

    def __init__(self, config: DFINEConfig, classes: int) -> None:
        super().__init__(config)
        activation = config.decoder_activation
        width, depth, outputs = config.width, config.decoder_layers, 4 * (config.bins + 1)
        self.layers = nn.ModuleList(self.make_layer(config) for _ in range(depth))
        self.first_box_head = MLP((width, width, width, 4), activation)
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(depth))
        self.box_heads = nn.ModuleList(
            MLP((width, width, width, outputs), activation) for _ in range(config.box_heads)
        )
        self.quality_heads = nn.ModuleList(
            MLP((4 * (STEEPEST + 1), QUALITY_WIDTH, 1), activation) for _ in range(depth)
        )

    @staticmethod
    def make_layer(config: DFINEConfig) -> nn.Module:
        """A layer, as ``DecoderLayer``."""
        return DFINELayer(config)

    def embed_boxes(self, boxes: Tensor) -> Tensor:
        """Query embeddings [.., N, D] of boxes [.., N, 4] cxcywh."""
        return super().embed_boxes(boxes).clamp(-FARTHEST, FARTHEST)

    def quality(self, layer: int, corners: Tensor) -> Tensor:
        """[B, N, 1] what is added to class logits: how sure edges [B, N, 4, K] are."""
        highest = corners.softmax(-1).topk(STEEPEST, -1).values
        heights = torch.cat([highest, highest.mean(-1, keepdim=True)], -1)
        return self.quality_heads[layer](heights.flatten(-2))  # type: ignore[no-any-return]


def boxes_to_move(first: Tensor, groups: Sequence[ObjectQueries]) -> Tensor:
    """[B, N, 4] cxcywh, whose edges move: ``first``, or what a group brings in its place.

    Args:
        first: [B, N, 4] of the first layer.
        groups: side by side, N queries in total.
    """
    if all(group.start is None for group in groups):
        return first
    own = torch.split(first, [group.count for group in groups], 1)
    pairs = zip(own, groups, strict=True)
    return torch.cat([part if group.start is None else group.start for part, group in pairs], 1)


class Refinement:
    """What the layers have made of the boxes so far.

    Args:
        decoder: heads.
        config: bins, bound and curvature.
        start: [B, N, 4] reference logits.
        groups: whose queries they are, side by side.
    """

    def __init__(
        self,
        decoder: DFINEDecoder,
        config: DFINEConfig,
        start: Tensor,
        groups: Sequence[ObjectQueries],
    ) -> None:
        self.decoder, self.curvature, self.start = decoder, config.curvature, start
        self.groups = groups
        bins = config.bins + 1
        self.distances = bin_distances(bins, config.bound, config.curvature, start.device)
        self.shape = (*start.shape[:2], 4, bins)
        self.reference = start.sigmoid()
        self.logits: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.corners: list[Tensor] = []
        self.before: Tensor | None = None
        self.embedding: Tensor | None = None
        self.embeds_refined = config.embeds_refined

    def embed(self) -> Tensor:
        """Query embeddings [B, N, D] of the next layer."""
        if self.embedding is None or self.embeds_refined:
            self.embedding = self.decoder.embed_boxes(self.reference)
        return self.embedding

    def predict(self, layer: int, states: Tensor) -> None:
        """Take in the states [B, N, D] of the next layer."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            if not layer:
                self.first = box_logits(self.decoder.first_box_head, states, self.start).sigmoid()
                self.moved = boxes_to_move(self.first.detach(), self.groups)
            joined = states if self.before is None else states + self.before
            head = min(layer, len(self.decoder.box_heads) - 1)
            corners: Tensor = self.decoder.box_heads[head](joined).view(self.shape)
            if self.corners:
                corners = corners + self.corners[-1]
            moves = mean_distances(corners, self.distances)
            box = moved_edges(self.moved, moves, self.curvature)
            logits = self.decoder.class_heads[layer](states)
            if not layer:
                self.first_logits = logits
            self.logits.append(logits + self.decoder.quality(layer, corners))
        self.corners.append(corners)
        self.boxes.append(box)
        self.reference, self.before = box.detach(), states.detach()


class DFINE(SelectingDetector):
    """A hybrid encoder, queries selected among its tokens, and refined distributions of edges.

    Args:
        config: architecture.
        classes: C.
    """

    config: DFINEConfig
    config_class: ClassVar[type[DFINEConfig]] = DFINEConfig
    decoder: DFINEDecoder

    def __init__(self, config: DFINEConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.encoder = self.make_encoder(config, self.backbone.stage_channels[-config.stages :])
        same = config.encoder_width == config.width
        self.levels = nn.ModuleList(
            nn.Identity() if same else ConvNorm(config.encoder_width, config.width)
            for _ in range(config.levels)
        )
        self.decoder = self.make_decoder(config, classes)
        self.initialise()
        initialise_last(self.decoder.first_box_head)
        for head in self.decoder.quality_heads:
            assert isinstance(head, MLP)
            initialise_last(head)
        for module in self.decoder.modules():
            if isinstance(module, UnevenDeformableAttention):
                initialise_deformable(module)
            elif isinstance(module, Gate):  # both halves alike, whatever the states
                nn.init.zeros_(module.gate.weight)
                nn.init.zeros_(module.gate.bias)

    @staticmethod
    def make_encoder(config: DFINEConfig, channels: Sequence[int]) -> HybridEncoder:
        """Of a backbone's stages of so many channels, finest first."""
        return HybridEncoder(config, channels, elan_blocks(config))

    @staticmethod
    def make_decoder(config: DFINEConfig, classes: int) -> DFINEDecoder:
        """The layers with their heads."""
        return DFINEDecoder(config, classes)

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; a group without content starts as its own queries do."""
        images = memory.tokens.shape[0]
        start = self.references(groups).expand(images, -1, -1)
        refinement = Refinement(self.decoder, self.config, start, groups)
        ratios = valid_ratios(memory.padding, memory.levels)

        def aim(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            if index:
                refinement.predict(index - 1, hidden)
            place = on_levels(refinement.reference, ratios, len(memory.levels))
            return refinement.embed(), place

        hidden = self.contents(memory, groups).expand(images, -1, -1)
        states, trace = run_decoder(self.decoder.layers, hidden, aim, memory, sizes, attention)
        refinement.predict(len(states) - 1, states[-1])
        distributions = BoxDistributions(
            torch.stack(refinement.corners),
            refinement.moved,
            refinement.first_logits,
            refinement.first,
            refinement.distances,
            refinement.curvature,
        )
        logits, boxes = torch.stack(refinement.logits), torch.stack(refinement.boxes)
        return Decoded(logits, boxes, states[-1], trace, distributions=distributions)
