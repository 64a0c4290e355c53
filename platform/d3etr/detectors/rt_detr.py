"""RT-DETR (Zhao et al., arXiv 2304.08069) and RT-DETRv2 (Lv et al., arXiv 2407.17140).

Shapes: B images · N queries · C classes · D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from d3etr.config.base import Size
from d3etr.detectors.conv_norm import ConvNorm
from d3etr.detectors.deformable_attention import DeformableAttention, initialise_deformable
from d3etr.detectors.deformable_decoder import (
    References,
    Refinement,
    decode_around,
    deformable_layers,
)
from d3etr.detectors.groups import Decoded, GroupSize
from d3etr.detectors.hybrid_encoder import HybridEncoder, repvgg_blocks
from d3etr.detectors.selection import SelectingConfig, SelectingDecoder, SelectingDetector
from d3etr.detectors.transformer import MLP
from d3etr.structures import Memory, ObjectQueries


class RTDETRConfig(SelectingConfig):
    """RT-DETR."""

    name: Literal["rt_detr"] = "rt_detr"
    points: Size = 4
    """Places that each head samples on each level."""
    sampling: Literal["bilinear", "discrete"] = "bilinear"
    """discrete: the nearest cell, without interpolation and with no gradient to the places
    (RT-DETRv2's fine-tuning for runtimes without grid sampling)."""
    look_forward_twice: bool = True
    """A layer's boxes also teach the layer before, as in the official code."""


class RTDETRDecoder(SelectingDecoder):
    """The layers with their heads.

    Args:
        config: uses decoder_layers and what its layers use.
        classes: C.
    """

    def __init__(self, config: RTDETRConfig, classes: int) -> None:
        super().__init__(config)
        width, depth = config.width, config.decoder_layers
        self.layers = deformable_layers(
            config,
            lambda: DeformableAttention(
                width, config.heads, config.levels, config.points, config.sampling
            ),
        )
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(depth))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(depth))


class RTDETR(SelectingDetector):
    """A hybrid encoder, queries selected among its tokens, and a deformable decoder.

    Args:
        config: architecture.
        classes: C.
    """

    config: RTDETRConfig
    config_class = RTDETRConfig

    def __init__(self, config: RTDETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        channels = self.backbone.stage_channels[-config.levels :]
        self.encoder = HybridEncoder(config, channels, repvgg_blocks(config))
        self.levels = nn.ModuleList(
            ConvNorm(config.encoder_width, config.width) for _ in range(config.levels)
        )
        self.decoder = RTDETRDecoder(config, classes)
        self.initialise()
        for module in self.decoder.modules():
            if isinstance(module, DeformableAttention):
                initialise_deformable(module)

    def decode_together(
        self,
        memory: Memory,
        groups: Sequence[ObjectQueries],
        sizes: list[GroupSize],
        attention: bool,
    ) -> Decoded:
        """As of ``DetectionTransformer``; a group without content starts as its own queries do."""
        refinement: Refinement = "twice" if self.config.look_forward_twice else "detached"
        references = References(self.references(groups), self.decoder.embed, refinement)
        return decode_around(
            self.decoder, self.contents(memory, groups), references, memory, sizes, attention
        )
