"""A GroupNorm network for small images: residual blocks, total stride 8 for three stages."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.backbone import BackboneConfig

GROUPS = 8
WIDEST_REGISTER = 16
"""float32 numbers of an AVX-512 register."""


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, without its refusal of a single value per group (an image of a few pixels).

    A single value is its own mean: it becomes the channel's bias.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] of the same, normalised over each image's groups of channels."""
        return torch.group_norm(maps, self.num_groups, self.weight, self.bias, self.eps)


class StridedShortcut(nn.Conv2d):
    """A strided 1x1 convolution whose gradient stays inside its memory.

    On channels-last input of fewer channels than a vector register holds, the weight gradient of
    the library's own writes past its workspace (oneDNN issue 6035), which ends in a crash later.
    There, pixels are dropped first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]."""
        if self.in_channels >= WIDEST_REGISTER:
            return super().forward(x)
        return functional.conv2d(functional.avg_pool2d(x, 1, self.stride[0]), self.weight)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut.

    Args:
        inputs: input channels, a multiple of 8.
        outputs: output channels, a multiple of 8.
        stride: 1, or 2 to halve the resolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = _convolution(inputs, outputs, stride=stride)
        self.norm1 = GroupNorm(GROUPS, outputs)
        self.convolution2 = _convolution(outputs, outputs)
        self.norm2 = GroupNorm(GROUPS, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                StridedShortcut(inputs, outputs, 1, stride, bias=False),
                GroupNorm(GROUPS, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]."""
        y = functional.relu(self.norm1(self.convolution1(x)), inplace=True)
        y = self.norm2(self.convolution2(y))
        return functional.relu(y + self.shortcut(x), inplace=True)


class SmallBackbone(nn.Module):
    """Stem at full resolution, then stages that each halve it.

    Args:
        config: uses stem_width, stage_widths and stage_blocks.

    Attributes:
        config: what it was built from.
        channels: channels of the output.
        stride: pixels per output cell.
        stage_channels: channels of each stage's output.
        stage_strides: pixels per cell of each stage's output.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.stage_widths[-1]
        self.stage_channels = config.stage_widths
        self.stage_strides = tuple(2 ** (k + 1) for k in range(len(config.stage_widths)))
        self.stride: int = self.stage_strides[-1]
        self.stem = nn.Sequential(
            _convolution(3, config.stem_width), GroupNorm(GROUPS, config.stem_width)
        )
        blocks = []
        for inputs, outputs in pairwise((config.stem_width, *config.stage_widths)):
            blocks.append(ResidualBlock(inputs, outputs, stride=2))
            blocks += [ResidualBlock(outputs, outputs, 1) for _ in range(config.stage_blocks - 1)]
        self.blocks = nn.Sequential(*blocks)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, channels, ceil(height / stride), ceil(width / stride)]."""
        return self.pyramid(pixels, 1)[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Feature maps [B, channels, h, w] of the last ``count`` stages, finest first."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = functional.relu(self.stem(pixels), inplace=True)
        maps = []
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if index % self.config.stage_blocks == 0:
                maps.append(x)
        return maps[-count:]
