"""RT-DETR's hybrid encoder (Zhao et al., arXiv 2304.08069, section 4.2).

Attention within the coarsest level alone (AIFI), then convolutions that fuse the levels, down the
pyramid and up again (CCFF).

Shapes: B images · V feature levels, finest first · D' encoder width · h, w cells of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.detectors.attention import SelfAttention
from d3etr.detectors.base import shrink_padding
from d3etr.detectors.conv_norm import ConvNorm, silu
from d3etr.detectors.transformer import EncoderLayer

if TYPE_CHECKING:
    from d3etr.detectors.selection import SelectingConfig

BLOCKS = 3
"""RepVGG blocks of each fusion."""
TEMPERATURE = 10_000.0


class RepVGGBlock(nn.Module):
    """A 3x3 and a 1x1 convolution added up (Ding et al., arXiv 2101.03697, without the identity).

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = ConvNorm(width, width, 3)
        self.narrow = ConvNorm(width, width, 1)
        self.activation = silu()

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] of the same."""
        return self.activation(self.wide(x) + self.narrow(x))  # type: ignore[no-any-return]


class CSPRepLayer(nn.Module):
    """RepVGG blocks beside a shortcut.

    Args:
        inputs: channels.
        outputs: channels.
        within: channels of the blocks and the shortcut.
        blocks: how many.
    """

    def __init__(self, inputs: int, outputs: int, within: int, blocks: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, within, activation=silu)
        self.shortcut = ConvNorm(inputs, within, activation=silu)
        self.blocks = nn.Sequential(*(RepVGGBlock(within) for _ in range(blocks)))
        self.last = (
            nn.Identity() if within == outputs else ConvNorm(within, outputs, activation=silu)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        return self.last(self.blocks(self.first(x)) + self.shortcut(x))  # type: ignore[no-any-return]


def side_by_side(one: Tensor, other: Tensor) -> Tensor:
    """[B, 2 D', h, w] of two maps [B, D', h, w]."""
    return torch.cat([one, other], 1)


class EncoderBlocks(NamedTuple):
    """What an encoder fuses levels by; each but ``join`` makes a module.

    Attributes:
        lateral: of [B, D', h, w], before the map goes a level down.
        fuse: of two maps that were joined to [B, D', h, w].
        halve: of [B, D', h, w] to half the resolution, rounded up.
        join: two maps [B, D', h, w] for ``fuse``.
    """

    lateral: Callable[[], nn.Module]
    fuse: Callable[[], nn.Module]
    halve: Callable[[], nn.Module]
    join: Callable[[Tensor, Tensor], Tensor] = side_by_side


def repvgg_blocks(config: SelectingConfig) -> EncoderBlocks:
    """RT-DETR's."""
    width = config.encoder_width
    return EncoderBlocks(
        lambda: ConvNorm(width, width, activation=silu),
        lambda: CSPRepLayer(2 * width, width, int(width * config.expansion), BLOCKS),
        lambda: ConvNorm(width, width, 3, 2, activation=silu),
    )


class HybridEncoder(nn.Module):
    """Maps of the backbone's last stages to maps of one width that know of each other.

    Args:
        config: uses heads, dropout, encoder_layers, encoder_width and encoder_feedforward.
        channels: of the backbone's stages, finest first.
        blocks: what levels are fused by.
    """

    def __init__(
        self, config: SelectingConfig, channels: Sequence[int], blocks: EncoderBlocks
    ) -> None:
        super().__init__()
        width, steps = config.encoder_width, config.levels - 1
        own = config.model_copy(update={"width": width, "feedforward": config.encoder_feedforward})
        self.join = blocks.join
        self.projections = nn.ModuleList(ConvNorm(count, width) for count in channels)
        self.layers = nn.ModuleList(
            EncoderLayer(own, SelfAttention(own), nn.GELU) for _ in range(config.encoder_layers)
        )
        self.laterals = nn.ModuleList(blocks.lateral() for _ in range(steps))
        self.top_down = nn.ModuleList(blocks.fuse() for _ in range(steps))
        self.downsamples = nn.ModuleList(blocks.halve() for _ in range(steps))
        self.bottom_up = nn.ModuleList(blocks.fuse() for _ in range(steps))

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None) -> list[Tensor]:
        """Fused maps [B, D', h, w] of the same resolutions, finest first.

        Args:
            maps: [B, channels, h, w] of the backbone's stages, finest first.
            padding: [B, height, width] bool at the images' resolution, or None.
        """
        *finer, top = self.project(maps)
        tops = [self.look_around(top, padding)]
        for lateral, fuse, own in zip(self.laterals, self.top_down, finer[::-1], strict=True):
            tops[-1] = lateral(tops[-1])
            # As large as the finer map, which need not have an even number of rows.
            upsampled = functional.interpolate(tops[-1], size=own.shape[-2:])
            tops.append(fuse(self.join(upsampled, own)))
        fused = [tops.pop()]
        for halve, fuse in zip(self.downsamples, self.bottom_up, strict=True):
            fused.append(fuse(self.join(halve(fused[-1]), tops.pop())))
        return fused

    def project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, D', h, w] of all levels, of those of the backbone, finest first."""
        return [project(part) for project, part in zip(self.projections, maps, strict=True)]

    def look_around(self, top: Tensor, padding: Tensor | None) -> Tensor:
        """The coarsest level [B, D', h, w], whose cells attend to each other."""
        height, width = top.shape[-2:]
        hidden = shrink_padding(padding, (height, width))
        tokens: Tensor = top.flatten(2).transpose(1, 2)
        position = grid_encoding((height, width), tokens)
        hidden = None if hidden is None else hidden.flatten(1)
        for layer in self.layers:
            tokens = layer(tokens, position, padding=hidden)
        return tokens.transpose(1, 2).reshape(top.shape)


def grid_encoding(grid: tuple[int, int], like: Tensor) -> Tensor:
    """[1, S, D'] sine encoding of a grid's cells by their numbers, row-major.

    Sines, then cosines of the row, then those of the column. The official code swaps rows and
    columns, which is the same on its square images alone.

    Args:
        grid: (h, w).
        like: [.., D'], gives width, device and type.
    """
    count = like.shape[-1] // 4
    powers = torch.arange(count, device=like.device, dtype=torch.float32) / count
    rates = TEMPERATURE**-powers
    rows, columns = (
        torch.arange(side, device=like.device, dtype=torch.float32)[:, None] * rates
        for side in grid
    )
    both = (
        rows[:, None].expand(-1, grid[1], -1),
        columns[None].expand(grid[0], -1, -1),
    )
    parts = [wave for angles in both for wave in (angles.sin(), angles.cos())]
    return torch.cat(parts, -1).flatten(0, 1)[None].to(like.dtype)
