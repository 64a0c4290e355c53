"""Configuration of the vision transformers below LW-DETR and RF-DETR."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from d3etr.config.base import Section, Size

Block = Annotated[int, Field(ge=0, le=100)]
Outputs = Annotated[tuple[Block, ...], Field(min_length=1)]
"""After how many blocks features are taken."""


def rising(outputs: tuple[int, ...]) -> bool:
    """Whether numbers of blocks rise, from 1 at least."""
    return all(one < other for one, other in pairwise((0, *outputs)))


class ViTConfig(Section):
    """Backbone ``vit``: a vision transformer most of whose blocks attend within windows."""

    kind: Literal["dinov2", "lw_detr"] = "dinov2"
    """dinov2: RF-DETR's, with a class token in every window and a last norm. lw_detr: LW-DETR's,
    with neither, and keys without a bias."""
    width: Size = 384
    """Channels."""
    blocks: Annotated[int, Field(ge=1, le=100)] = 12
    """Blocks; official RF-DETR of patches of 14 pixels: 11, as nothing reads the twelfth."""
    heads: Size = 6
    """Attention heads; ``width`` must be a multiple of their number."""
    expansion: Annotated[int, Field(ge=1, le=16)] = 4
    """Channels between the two linear maps of each block, as a factor on ``width``."""
    patch: Size = 16
    """Side of a patch in pixels: the stride of the features."""
    windows: Size = 2
    """Windows along each side of an image; 1: every block attends over the whole image. Images are
    padded to multiples of ``patch`` times this."""
    whole: tuple[Block, ...] = (3, 6, 9)
    """Blocks, counted from 0, that attend over the whole image all the same."""
    outputs: Outputs = (3, 6, 9, 12)
    """After how many blocks features are taken, rising; the last one is ``blocks``."""
    positions: Size = 24
    """Side of the grid of patches that position embeddings are learned for; they are resized to
    that of an image."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads})")
        if not rising(self.outputs) or self.outputs[-1] != self.blocks:
            raise ValueError(
                f"outputs {list(self.outputs)} must rise from 1 at least to blocks ({self.blocks}):"
                " later blocks would have no effect"
            )
        if self.windows == 1 and self.whole:
            raise ValueError("whole has no effect with one window: set it to []")
        if self.whole and max(self.whole) >= self.blocks:
            raise ValueError(f"whole names block {max(self.whole)} of {self.blocks}")
        return self
