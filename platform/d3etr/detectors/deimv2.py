"""DEIMv2 (Huang et al., arXiv 2509.20787).

D-FINE's queries and distributions, with RMS norms and gated feed-forward blocks in the decoder, an
encoder that adds levels up instead of stacking them, and for the smallest sizes one that has no
attention. transformers (5.23) computes a little differently from the official code
(``implementation``).

Shapes: B images · N queries · D width · D' encoder width · h, w cells of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from d3etr.detectors.attention import SelfAttention
from d3etr.detectors.base import shrink_padding
from d3etr.detectors.conv_norm import ConvNorm, silu
from d3etr.detectors.d_fine import (
    DFINE,
    DFINEConfig,
    DFINEDecoder,
    ELANLayer,
    Gate,
    halving,
)
from d3etr.detectors.deformable_attention import UnevenDeformableAttention
from d3etr.detectors.deformable_decoder import DeformableDecoderLayer
from d3etr.detectors.hybrid_encoder import EncoderBlocks, HybridEncoder
from d3etr.detectors.transformer import MLP, Activation, relu

EPSILON = 1e-6
"""Of RMS norms."""
LITE_LEVELS = 2


class DEIMv2Config(DFINEConfig):
    """DEIMv2."""

    name: Literal["deimv2"] = "deimv2"  # type: ignore[assignment]
    encoder: Literal["hybrid", "lite"] = "hybrid"
    """lite: the backbone's last stage and a level of half its resolution, without attention; for
    the sizes Atto, Femto and Pico, with ``levels`` 2 and ``encoder_layers`` 0."""
    fusion: Literal["elan4", "elan5"] = "elan5"
    """elan4: a 3x3 convolution behind each of the two stages of the encoder's fusions (official:
    N and smaller). elan5: none (S to X)."""
    gateway: bool = True
    """A gate weighs states against what they have read; false: a residual (official: lite)."""
    shared_box_head: bool = False
    """All layers have one box head (official: lite)."""
    activation: Literal["relu", "silu"] = "silu"
    """Between linear layers of heads, and of what embeds boxes; see ``implementation``."""
    implementation: Literal["official", "transformers"] = "official"
    """Whose computation. transformers (5.23): tokens are projected and normed before the heads that
    select among them, each layer embeds its own boxes and not the first layer's, and ``activation``
    is of the embedding alone, where heads have relu. The same weights detect something else."""

    @property
    def decoder_activation(self) -> Activation:
        """What is between linear layers of heads."""
        return self.embedding_activation if self.implementation == "official" else relu

    @property
    def embedding_activation(self) -> Activation:
        """Likewise of what embeds boxes."""
        return silu if self.activation == "silu" else relu

    @property
    def projects_tokens(self) -> bool:
        """In transformers only."""
        return self.implementation == "transformers"

    @property
    def embeds_refined(self) -> bool:
        """In transformers only."""
        return self.implementation == "transformers"

    @property
    def box_heads(self) -> int:
        """One for each layer, or one for all."""
        return 1 if self.shared_box_head else self.decoder_layers

    @property
    def stages(self) -> int:
        """The lite encoder makes the coarser level itself."""
        return self.levels - (self.encoder == "lite")

    @property
    def criterion_defaults(self) -> Mapping[str, float | str]:
        """The matchability-aware loss; sizes with the lite encoder learn boxes alone, as official.

        The official code changes its matching cost for the last epochs, which ours does not.
        """
        own: dict[str, float | str] = {**super().criterion_defaults, "class_loss": "mal"}
        if self.encoder == "lite":
            own |= {"union_matching": False, "fgl_weight": 0.0, "ddf_weight": 0.0}
        return own

    @model_validator(mode="after")
    def _encoder_and_halves_fit(self) -> Self:
        if self.feedforward % 2:
            raise ValueError(f"feedforward is {self.feedforward}: expected an even number")
        if self.encoder == "lite" and (self.levels, self.encoder_layers) != (LITE_LEVELS, 0):
            raise ValueError(
                f"levels is {self.levels} and encoder_layers {self.encoder_layers}: encoder 'lite' "
                f"has {LITE_LEVELS} levels and no attention; set levels to {LITE_LEVELS} and "
                "encoder_layers to 0"
            )
        return self


def rms_norm(config: DEIMv2Config) -> nn.Module:
    """Of states [.., D]."""
    return nn.RMSNorm(config.width, eps=EPSILON)


class SwiGLU(nn.Module):
    """Post-norm residual block whose linear map is gated by another (Shazeer, arXiv 2002.05202).

    Args:
        config: uses width, feedforward (of both maps together) and dropout.
    """

    def __init__(self, config: DEIMv2Config) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.feedforward)
        self.outer = nn.Linear(config.feedforward // 2, config.width)
        self.norm = rms_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.inner, self.outer):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        gate, value = self.inner(x).chunk(2, -1)
        hidden = self.outer(functional.silu(gate) * value)
        return self.norm(x + self.dropout(hidden))  # type: ignore[no-any-return]


class DEIMv2Layer(DeformableDecoderLayer):
    """Sampled cross-attention with a gate or a residual, RMS norms and a gated feed-forward block.

    Args:
        config: of the detector.
    """

    def __init__(self, config: DEIMv2Config) -> None:
        attention = UnevenDeformableAttention(config.width, config.heads, config.level_points)
        super().__init__(config, SelfAttention(config), attention)
        norm = rms_norm(config)
        self.self_norm = rms_norm(config)
        self.cross_norm = Gate(config.width, norm) if config.gateway else norm
        self.feedforward = SwiGLU(config)

    def join(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """As of ``DecoderLayer``."""
        if isinstance(self.cross_norm, Gate):
            return self.cross_norm(hidden, mixed)  # type: ignore[no-any-return]
        return super().join(hidden, mixed)


class DEIMv2Decoder(DFINEDecoder):
    """The layers with their heads.

    Args:
        config: as of ``DFINEDecoder``.
        classes: C.
    """

    def __init__(self, config: DEIMv2Config, classes: int) -> None:
        super().__init__(config, classes)
        width = config.width
        self.position_head = MLP((4, width, width, width), config.embedding_activation)

    @staticmethod
    def make_layer(config: DFINEConfig) -> nn.Module:
        """As of ``DFINEDecoder``."""
        return DEIMv2Layer(cast(DEIMv2Config, config))


class LiteEncoder(HybridEncoder):
    """Two levels of one map of the backbone, and the picture's mean in place of attention.

    Args:
        config: as of ``HybridEncoder``.
        channels: of the one stage.
        blocks: what levels are fused by; ``halve`` makes the coarser level, too.
    """

    def __init__(
        self, config: DEIMv2Config, channels: Sequence[int], blocks: EncoderBlocks
    ) -> None:
        super().__init__(config, channels, blocks)
        self.coarser = blocks.halve()
        self.context = ConvNorm(config.encoder_width, config.encoder_width, activation=silu)

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """As of ``HybridEncoder``."""
        [finer] = super().project(maps)
        return [finer, self.coarser(finer)]

    def look_around(self, top: Tensor, padding: Tensor | None) -> Tensor:
        """The coarser level [B, D', h, w], with the mean over the picture added to its cells."""
        hidden = shrink_padding(padding, (top.shape[-2], top.shape[-1]))
        if hidden is None:
            mean = top.mean((-2, -1), keepdim=True)
        else:
            seen = (~hidden)[:, None].to(top.dtype)
            mean = (top * seen).sum((-2, -1), keepdim=True) / seen.sum((-2, -1), keepdim=True)
        return self.context(top + mean)  # type: ignore[no-any-return]


def summing_blocks(config: DEIMv2Config) -> EncoderBlocks:
    """What DEIMv2's encoders fuse levels by."""
    width, lite = config.encoder_width, config.encoder == "lite"

    def pooling() -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(3, 2, 1), ConvNorm(width, width, activation=silu))

    return EncoderBlocks(
        nn.Identity if lite else lambda: ConvNorm(width, width),
        lambda: ELANLayer(
            width, width, config.within, config.encoder_blocks, mixes=config.fusion == "elan4"
        ),
        pooling if lite else lambda: halving(width),
        torch.add,
    )


class DEIMv2(DFINE):
    """A hybrid or lite encoder, queries selected among its tokens, refined distributions of edges.

    Args:
        config: architecture.
        classes: C.
    """

    config: DEIMv2Config
    config_class = DEIMv2Config

    @staticmethod
    def make_encoder(config: DFINEConfig, channels: Sequence[int]) -> HybridEncoder:
        """As of ``DFINE``."""
        own = cast(DEIMv2Config, config)
        kind = LiteEncoder if own.encoder == "lite" else HybridEncoder
        return kind(own, channels, summing_blocks(own))

    @staticmethod
    def make_decoder(config: DFINEConfig, classes: int) -> DFINEDecoder:
        """As of ``DFINE``."""
        return DEIMv2Decoder(cast(DEIMv2Config, config), classes)
