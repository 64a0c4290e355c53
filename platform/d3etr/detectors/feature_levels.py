"""From backbone features to the tokens of several feature levels, and where those lie.

Shapes: B images · V feature levels · S tokens of all levels · D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.backbones import Backbone
from d3etr.detectors.base import flat_padding, shrink_padding
from d3etr.detectors.position import TEMPERATURE, SineEncoding
from d3etr.detectors.small_backbone import GroupNorm
from d3etr.detectors.transformer import Encoder
from d3etr.structures import Levels, Memory

BACKBONE_LEVELS = 3
"""Stages that a backbone gives at most; further levels are strided convolutions of the last."""
GROUPS = 32


class FeatureLevels(nn.Module):
    """Projects the backbone's last stages to one width and adds coarser levels.

    Args:
        config: uses width and feature_levels.
        backbone: gives the stages.
        stages: how many of them at most.

    Attributes:
        stages: number of the backbone's stages that are used.
        strides: pixels per cell of each level, finest first.
    """

    def __init__(
        self, config: DetectorConfig, backbone: Backbone, stages: int = BACKBONE_LEVELS
    ) -> None:
        super().__init__()
        width, levels = config.width, config.feature_levels
        self.stages = min(levels, stages, len(backbone.stage_channels))
        channels = backbone.stage_channels[-self.stages :]
        strides = backbone.stage_strides[-self.stages :]
        further = range(1, levels - self.stages + 1)
        self.strides = (*strides, *(strides[-1] * 2**level for level in further))
        layers = [nn.Conv2d(count, width, 1) for count in channels]
        coarser = [channels[-1], *[width] * levels]
        layers += [
            nn.Conv2d(coarser[index], width, 3, stride=2, padding=1)
            for index in range(levels - self.stages)
        ]
        self.projections = nn.ModuleList(
            nn.Sequential(layer, GroupNorm(GROUPS, width)) for layer in layers
        )
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Backbone maps [B, channels, h, w], finest first, to V maps [B, D, h, w]."""
        outputs = [
            project(features) for project, features in zip(self.projections, maps, strict=False)
        ]
        source = maps[-1]
        for project in self.projections[len(maps) :]:
            source = project(source)
            outputs.append(source)
        return outputs


class LevelPositions(nn.Module):
    """Position encoding of tokens: their cell's, plus a learned embedding of their level.

    Args:
        width: D.
        levels: V.
        temperature: as of ``SineEncoding``.
        centred: as of ``SineEncoding``.
    """

    def __init__(
        self, width: int, levels: int, temperature: float = TEMPERATURE, centred: bool = True
    ) -> None:
        super().__init__()
        self.temperature, self.centred = temperature, centred
        self.encoding = SineEncoding(width, temperature, centred)
        self.level = nn.Parameter(torch.empty(levels, width).normal_())

    def forward(self, levels: Levels, paddings: list[Tensor | None]) -> Tensor:
        """[B, S, D], or [1, S, D] without padding.

        Args:
            levels: the V grids.
            paddings: per level [B, h, w] bool, or None.
        """
        parts = [
            self.encoding.grid(grid, padding) + embedding
            for grid, padding, embedding in zip(levels, paddings, self.level, strict=True)
        ]
        return torch.cat(parts, 1)


def encode_levels(
    maps: list[Tensor],
    padding: Tensor | None,
    levels: FeatureLevels,
    position: LevelPositions,
    encoder: Encoder,
) -> Memory:
    """Tokens of all levels, encoded by deformable attention around their own cells.

    Args:
        maps: of the backbone, [B, channels, h, w] each, finest first.
        padding: [B, height, width] bool of the images, or None.
        levels: makes V maps of them.
        position: of their cells.
        encoder: its attention takes ``reference`` and ``levels``.
    """
    maps = levels(maps)
    grids = tuple((part.shape[-2], part.shape[-1]) for part in maps)
    paddings = [shrink_padding(padding, grid) for grid in grids]
    encoding = position(grids, paddings)
    tokens = torch.cat([part.flatten(2).transpose(1, 2) for part in maps], 1)
    flat = flat_padding(paddings)
    ratios = valid_ratios(flat, grids)
    centres = cell_centres(ratios, grids, tokens).expand(tokens.shape[0], -1, -1)
    reference = on_levels(centres, ratios, len(grids))
    tokens = encoder(tokens, encoding, reference=reference, padding=flat, levels=grids)
    return Memory(tokens, encoding, flat, grids)


def refuse_width(width: int, name: str) -> None:
    """Refuse a width that the GroupNorm of the maps does not divide.

    Args:
        width: D.
        name: of the detector.

    Raises:
        ValueError: it does not.
    """
    if width % GROUPS:
        raise ValueError(
            f"width {width} must be a multiple of {GROUPS} for detector '{name}' "
            "(GroupNorm of its feature levels)"
        )


def valid_ratios(padding: Tensor | None, levels: Levels) -> Tensor | None:
    """Share of each padded level that the image itself covers, [B, V, 2] as (x, y).

    Args:
        padding: [B, S] bool, or None: everything is covered.
        levels: the V grids that S runs over.
    """
    if padding is None:
        return None
    ratios = []
    for part, (height, width) in zip(
        torch.split(padding, [h * w for h, w in levels], 1), levels, strict=True
    ):
        visible = ~part.view(-1, height, width)
        ratios.append(
            torch.stack([visible[:, 0].sum(1) / width, visible[:, :, 0].sum(1) / height], -1)
        )
    return torch.stack(ratios, 1)


def on_levels(reference: Tensor, ratios: Tensor | None, levels: int) -> Tensor:
    """References relative to the image as references relative to each padded level.

    Args:
        reference: [B, N, 2] points or [B, N, 4] boxes in [0, 1].
        ratios: [B, V, 2], or None where nothing is padded.
        levels: V.

    Returns:
        [B, N, V, 2] or [B, N, V, 4].
    """
    if ratios is None:
        return reference[:, :, None].expand(-1, -1, levels, -1)
    repeated = ratios.repeat(1, 1, reference.shape[-1] // 2)
    return reference[:, :, None] * repeated[:, None]


def cell_centres(ratios: Tensor | None, levels: Levels, like: Tensor) -> Tensor:
    """Centre of each token's cell relative to its image, [B or 1, S, 2] as (x, y).

    Args:
        ratios: [B, V, 2], or None where nothing is padded.
        levels: the V grids that S runs over.
        like: gives the device.
    """
    parts = []
    for index, (height, width) in enumerate(levels):
        y = (torch.arange(height, device=like.device) + 0.5) / height
        x = (torch.arange(width, device=like.device) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack([grid_x.flatten(), grid_y.flatten()], -1)[None]
        parts.append(centres if ratios is None else centres / ratios[:, index, None])
    return torch.cat(parts, 1)
