"""DINOv3 (Siméoni et al., arXiv 2508.10104) with DEIMv2's spatial tuning adapter.

(Huang et al., arXiv 2509.20787, section 3.2.) A vision transformer of one stride whose patches know
their places by rotations of queries and keys; its features are resized to three strides, beside
maps of details by four convolutions. What brings both together is the encoder's projection.

In training, DINOv3 scales coordinates at random; ours does not.

Shapes: B images · h, w patches of an image · S tokens · H heads · E channels of a head · D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.backbone import BackboneConfig
from d3etr.config.dinov3 import MAPS, PATCH, DINOv3Config
from d3etr.detectors.conv_norm import ConvNorm
from d3etr.detectors.vit import SPREAD, Block, Sizes, draw_linear

STRIDES = (8, 16, 32)
BASE = 100.0
"""Of the rotations' frequencies."""


_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu_gated": functional.silu,
    "gelu_gated": functional.gelu,
}


class DINOv3Block(Block):
    """A block whose feed-forward part may be gated.

    Args:
        config: of the network.
    """

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__(
            Sizes(
                config.width,
                config.heads,
                config.inner,
                config.key_bias,
                config.first_scale,
                config.epsilon,
            )
        )
        self.gate = _GATES.get(config.feedforward)
        if self.gate is not None:
            self.inner = nn.Linear(config.width, 2 * config.inner)

    def activate(self, inner: Tensor) -> Tensor:
        """As of ``Block``; the gate comes in front of what it weighs."""
        if self.gate is None:
            return super().activate(inner)
        gate, value = inner.chunk(2, -1)
        return self.gate(gate) * value


class Rotation:
    """Turns queries and keys of patches by angles that tell their places.

    Args:
        grid: (h, w) of patches; those of an image are all over [-1, 1].
        channels: E of a head, a multiple of 4.
        like: gives the device.
    """

    def __init__(self, grid: tuple[int, int], channels: int, like: Tensor) -> None:
        self.patches = grid[0] * grid[1]
        rates = BASE ** -torch.arange(0, 1, 4 / channels, device=like.device, dtype=torch.float32)
        axes = [
            2 * (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side - 1
            for side in grid
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * places[..., None] * rates).flatten(1).tile(2)
        self.cosine, self.sine = angles.cos(), angles.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, S, E], of which the patches come last: others stay as they are."""
        others, own = torch.split(x, [x.shape[-2] - self.patches, self.patches], -2)
        first, second = own.chunk(2, -1)
        turned = own * self.cosine + torch.cat([-second, first], -1) * self.sine
        return torch.cat([others, turned.to(x.dtype)], -2)


class DINOv3(nn.Module):
    """The transformer with the adapter: maps of strides 8, 16 and 32.

    Maps are ceil(size / stride) large: images are padded with zeros to multiples of 32, as images
    in a batch are, and what cells lie in the padding alone is cut off.

    Args:
        config: uses dinov3.

    Attributes:
        config: what it was built from.
        channels: of the last map.
        stride: of the last map, in pixels.
        stage_channels: of each map: D and the adapter's.
        stage_strides: pixels per cell of each map.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        own = config.dinov3
        self.config, self.stage_strides = config, STRIDES
        self.stage_channels = tuple(own.width + own.detail * factor for factor in (2, 4, 4))
        self.channels, self.stride = self.stage_channels[-1], STRIDES[-1]
        self.patches = nn.Conv2d(3, own.width, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.randn(own.width) * SPREAD)
        self.registers: nn.Parameter | None = None
        if own.registers:
            self.registers = nn.Parameter(torch.randn(own.registers, own.width) * SPREAD)
        self.blocks = nn.ModuleList(DINOv3Block(own) for _ in range(own.blocks))
        self.norm = None if own.normed == "none" else nn.LayerNorm(own.width, own.epsilon)
        widths = (3, own.detail, 2 * own.detail, 4 * own.detail, 4 * own.detail)
        self.details = nn.ModuleList(
            ConvNorm(inputs, outputs, 3, 2) for inputs, outputs in pairwise(widths)
        )
        draw_linear(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, channels, h, w], the last map."""
        return self.pyramid(pixels, 1)[0]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Maps [B, channels, h, w] of the last ``count`` strides, finest first."""
        height, width = pixels.shape[-2:]
        padded = functional.pad(pixels, (0, -width % self.stride, 0, -height % self.stride))
        maps = zip(self._semantic(padded), self._detailed(padded), STRIDES, strict=True)
        return [
            torch.cat([semantic.to(detail.dtype), detail], 1)[
                ..., : math.ceil(height / stride), : math.ceil(width / stride)
            ]
            for semantic, detail, stride in [*maps][-count:]
        ]

    def _semantic(self, pixels: Tensor) -> list[Tensor]:
        """[B, D, h, w] of each stride."""
        own = self.config.dinov3
        patches: Tensor = self.patches(pixels)
        grid = (patches.shape[-2], patches.shape[-1])
        others = [self.class_token[None], *([] if self.registers is None else [self.registers])]
        first = torch.cat(others).to(patches.dtype).expand(patches.shape[0], -1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        turn = Rotation(grid, own.width // own.heads, patches)
        found: list[Tensor] = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, turn)
            if number not in own.outputs:
                continue
            normed = own.normed == "all" or (own.normed == "last" and number == own.blocks)
            tokens = self.norm(x) if normed and self.norm is not None else x
            cells = tokens[:, first.shape[1] :].transpose(1, 2).unflatten(2, grid)
            factor = PATCH / STRIDES[len(found)]
            size = [int(side * factor) for side in grid]
            found.append(functional.interpolate(cells, size, mode="bilinear"))
        assert len(found) == MAPS
        return found

    def _detailed(self, pixels: Tensor) -> list[Tensor]:
        """[B, channels, h, w] of each stride, by convolutions alone."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        first, *later = self.details
        x = functional.max_pool2d(functional.gelu(first(x)), 3, 2, 1)
        found: list[Tensor] = []
        for layer in later:
            x = layer(functional.gelu(x) if found else x)
            found.append(x)
        return found
