"""Configuration of DINOv3 below DEIMv2."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from d3etr.config.base import Section, Size
from d3etr.config.vit import rising

Block = Annotated[int, Field(ge=1, le=100)]
MAPS = 3
"""Of strides 8, 16 and 32."""
PATCH = 16
"""Pixels along a patch; what the maps of the spatial tuning adapter go with."""


class DINOv3Config(Section):
    """Backbone ``dinov3``: a DINOv3 with a spatial tuning adapter, DEIMv2's from S to X.

    Defaults are those of L, a ViT-S/16. Official: S ``width`` 192, M 256, as ViT without registers
    that was distilled from DINOv3; X ``feedforward`` silu_gated.
    """

    width: Size = 384
    """Channels of the transformer; official: 192 (S), 256 (M), 384 (L, X)."""
    blocks: Block = 12
    """Blocks of attention and feed-forward."""
    heads: Size = 6
    """Attention heads; ``width`` must be a multiple of four times their number. Official: one for
    each 64 channels."""
    inner: Size = 1536
    """Channels between the linear maps of each block."""
    feedforward: Literal["gelu", "silu_gated", "gelu_gated"] = "gelu"
    """Activation of each block, or gate of one of two linear maps by the other."""
    registers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Learned tokens beside the class token; official: 0 (S, M), 4 (L, X)."""
    key_bias: bool = True
    """Whether keys have a bias; in DINOv3's own weights it is 0."""
    first_scale: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Of what each block adds, by channel, before training; official: 1 without scales (S, M)."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Of layer norms; official: 1e-6 (S, M), 1e-5 (L, X)."""
    outputs: tuple[Block, Block, Block] = (6, 9, 12)
    """After how many blocks the maps of strides 8, 16 and 32 are taken, rising; the last one is
    ``blocks``. Official: 4, 8, 12 (S, M) and 6, 9, 12 (L, X)."""
    normed: Literal["all", "last", "none"] = "all"
    """Which of these maps go through the last norm; official: none (S, M) or all (L, X)."""
    detail: Size = 16
    """Channels of the adapter's first convolution; official: 16 (S, M), 32 (L), 64 (X)."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 4 * heads ({4 * self.heads})"
            )
        if not rising(self.outputs) or self.outputs[-1] != self.blocks:
            raise ValueError(
                f"outputs {list(self.outputs)} must rise to blocks ({self.blocks}): later blocks "
                "would have no effect"
            )
        return self
