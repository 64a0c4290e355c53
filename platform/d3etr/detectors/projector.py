"""LW-DETR's projector: maps of one stride to the decoder's feature levels.

(Chen et al., arXiv 2406.03459, section 3.1.) Each level has all maps, brought to its resolution,
and fuses them by a C2f block: convolutions one after the other, all of whose outputs are kept.

Shapes: B images · h, w cells of a map · V levels · D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from d3etr.detectors.conv_norm import ConvNorm, silu
from d3etr.detectors.transformer import relu

WIDEST = 512
"""Channels above which a map is narrowed before it is enlarged."""

Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every cell.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] of the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class C2f(nn.Module):
    """One convolution in front, pairs of 3x3 ones, and one behind the outputs of all.

    Args:
        inputs: channels.
        outputs: channels.
        within: channels of the pairs.
        blocks: pairs.
        norm: of the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, within: int, blocks: int, norm: Norm) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, 2 * within, activation=silu, norm=norm)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ConvNorm(within, within, 3, activation=silu, norm=norm),
                ConvNorm(within, within, 3, activation=silu, norm=norm),
            )
            for _ in range(blocks)
        )
        self.last = ConvNorm((2 + blocks) * within, outputs, activation=silu, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        parts = [*self.first(x).chunk(2, 1)]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))  # type: ignore[no-any-return]


def _sampler(channels: int, scale: float, norm: Norm) -> tuple[nn.Sequential, int]:
    """What brings a map to a level's resolution, and the channels that it then has."""
    if scale == 1:
        return nn.Sequential(), channels
    if scale < 1:
        halved = ConvNorm(channels, channels, 3, 2, activation=relu, norm=norm)
        return nn.Sequential(halved), channels
    if channels <= WIDEST:
        return nn.Sequential(nn.ConvTranspose2d(channels, channels // 2, 2, 2)), channels // 2
    narrowed = ConvNorm(channels, channels // 2, activation=relu, norm=norm)
    enlarged = nn.ConvTranspose2d(channels // 2, channels // 4, 2, 2)
    return nn.Sequential(narrowed, enlarged), channels // 4


class LevelProjector(nn.Module):
    """All maps to one feature level.

    Args:
        channels: of each map.
        scale: of the level's sides over the maps': 0.5, 1 or 2.
        width: D.
        within: channels of the C2f block's pairs.
        blocks: pairs.
        norm: of the convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scale: float,
        width: int,
        within: int,
        blocks: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        samplers = [_sampler(count, scale, norm) for count in channels]
        self.samplers = nn.ModuleList(sampler for sampler, _ in samplers)
        inputs = sum(count for _, count in samplers)
        self.fuse = C2f(inputs, width, within, blocks, norm)
        self.norm = ChannelNorm(width, 1e-6)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, channels, h, w] each to [B, D, scale * h, scale * w]."""
        sampled = [part(x) for part, x in zip(self.samplers, maps, strict=True)]
        return self.norm(self.fuse(torch.cat(sampled, 1)))  # type: ignore[no-any-return]


class Projector(nn.Module):
    """A ``LevelProjector`` for each level.

    Args:
        channels: of each map.
        scales: of each level, finest first.
        width: D.
        expansion: channels within the C2f blocks, as a factor on ``width``.
        blocks: pairs of convolutions in each.
        norm: of the convolutions.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scales: Sequence[float],
        width: int,
        expansion: float,
        blocks: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        within = int(width * expansion)
        self.levels = nn.ModuleList(
            LevelProjector(channels, scale, width, within, blocks, norm) for scale in scales
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, channels, h, w] to V levels [B, D, .., ..]."""
        return [level(maps) for level in self.levels]
