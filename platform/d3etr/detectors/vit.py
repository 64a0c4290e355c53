"""Vision transformers most of whose blocks attend within windows: below LW-DETR and RF-DETR.

(Chen et al., arXiv 2406.03459, section 3.2; Robinson et al., arXiv 2511.09554.) Tokens stay in the
order of windows from the first block to the last one, so that a block that attends over the whole
image costs no reordering.

Shapes: B images · h, w patches of an image · W windows along each side · S tokens of a window · D
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from d3etr.config.backbone import BackboneConfig
from d3etr.config.vit import ViTConfig
from d3etr.detectors.attention import attend, split_heads

SPREAD = 0.02
"""Standard deviation of weights before training, as published."""
EPSILON = 1e-6
"""Of layer norms."""


class Sizes(NamedTuple):
    """Of one block.

    Attributes:
        width: D.
        heads: of attention.
        inner: channels between the two linear layers.
        key_bias: whether keys have one.
        first_scale: of what is added, before training.
        epsilon: of layer norms.
    """

    width: int
    heads: int
    inner: int
    key_bias: bool
    first_scale: float
    epsilon: float


class Block(nn.Module):
    """Attention and two linear layers, pre-norm, each scaled by channel before it is added.

    Args:
        sizes: of its layers.
        windows: that its attention is over together: W^2 for the whole image.
        drop_path: how often training leaves out a branch for a window, as LW-DETR's code does.
    """

    def __init__(self, sizes: Sizes, windows: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        width, self.drop_path = sizes.width, drop_path
        self.heads, self.windows = sizes.heads, windows
        self.attention_norm = nn.LayerNorm(width, sizes.epsilon)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=sizes.key_bias)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.attention_scale = nn.Parameter(torch.full((width,), sizes.first_scale))
        self.inner_norm = nn.LayerNorm(width, sizes.epsilon)
        self.inner = nn.Linear(width, sizes.inner)
        self.outer = nn.Linear(sizes.inner, width)
        self.inner_scale = nn.Parameter(torch.full((width,), sizes.first_scale))

    def forward(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map [B W^2, S, D] to the same.

        Args:
            x: tokens.
            turn: changes queries and keys, each [B W^2, H, S, E], by their places.
        """
        tokens = self.attention_norm(x)
        if self.windows > 1:
            tokens = tokens.reshape(-1, self.windows * x.shape[1], x.shape[2])
        query, key, value = (
            split_heads(project(tokens), self.heads)
            for project in (self.query, self.key, self.value)
        )
        if turn is not None:
            query, key = turn(query), turn(key)
        mixed = self.output(attend(query, key, value, None, 0.0)).reshape(x.shape)
        x = x + self._kept(self.attention_scale * mixed)
        inner = self.activate(self.inner(self.inner_norm(x)))
        return x + self._kept(self.inner_scale * self.outer(inner))

    def _kept(self, branch: Tensor) -> Tensor:
        """The branch [B W^2, S, D], in training without some windows, the others enlarged."""
        kept: Tensor = stochastic_depth(branch, self.drop_path, "row", self.training)
        return kept

    def activate(self, inner: Tensor) -> Tensor:
        """What is between the two linear layers."""
        return functional.gelu(inner)


def _windowed_block(config: ViTConfig, whole: bool, drop_path: float) -> Block:
    """Whose attention is within windows, or over the whole image."""
    width, dinov2 = config.width, config.kind == "dinov2"
    inner, scale = config.expansion * width, 1.0 if dinov2 else 0.1
    sizes = Sizes(width, config.heads, inner, dinov2, scale, EPSILON)
    return Block(sizes, config.windows**2 if whole else 1, drop_path)


def draw_linear(module: nn.Module) -> None:
    """Draw every linear layer's weights as published."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=SPREAD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class WindowedViT(nn.Module):
    """Patches, position embeddings and blocks; maps of one stride.

    Maps are ceil(size / stride) large: images are padded with zeros to multiples of a patch times
    the windows, as images in a batch are, and what patches lie in the padding alone is cut off.

    Args:
        config: uses vit and drop_path.

    Attributes:
        config: what it was built from.
        channels: D.
        stride: pixels per patch.
        stage_channels: the one stage's.
        stage_strides: likewise.
        map_channels: of each map of ``maps``.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        vit = config.vit
        self.config, self.channels, self.stride = config, vit.width, vit.patch
        self.stage_channels, self.stage_strides = (vit.width,), (vit.patch,)
        self.map_channels = (vit.width,) * len(vit.outputs)
        self.patches = nn.Conv2d(3, vit.width, vit.patch, vit.patch)
        self.class_token: nn.Parameter | None = None
        self.norm: nn.LayerNorm | None = None
        if vit.kind == "dinov2":
            self.class_token = nn.Parameter(torch.randn(vit.width) * SPREAD)
            self.norm = nn.LayerNorm(vit.width, EPSILON)
        # The first is the class token's; LW-DETR's code has it too, and no class token.
        self.positions = nn.Parameter(torch.randn(1 + vit.positions**2, vit.width) * SPREAD)
        step = config.drop_path / max(1, vit.blocks - 1)
        self.blocks = nn.ModuleList(
            _windowed_block(vit, k in vit.whole, step * k) for k in range(vit.blocks)
        )
        draw_linear(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, D, h, w], the last map."""
        return self.maps(pixels)[-1]

    def pyramid(self, pixels: Tensor, count: int) -> list[Tensor]:
        """The last map alone: there is one stage, whatever ``count``."""
        return [self.forward(pixels)]

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """[B, D, h, w] behind the blocks that ``outputs`` names."""
        patches = self.patches(self._padded(pixels))
        grid = (patches.shape[-2], patches.shape[-1])
        x = self._windowed(patches.permute(0, 2, 3, 1) + self._of_grid(grid))
        if self.class_token is not None:
            first = (self.class_token + self.positions[0]).to(x.dtype)
            x = torch.cat([first.expand(x.shape[0], 1, -1), x], 1)
        height, width = (math.ceil(side / self.stride) for side in pixels.shape[-2:])
        found = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in self.config.vit.outputs:
                found.append(self._map(x, grid)[..., :height, :width])
        return found

    def _padded(self, pixels: Tensor) -> Tensor:
        cell = self.stride * self.config.vit.windows
        height, width = pixels.shape[-2:]
        return functional.pad(pixels, (0, -width % cell, 0, -height % cell))

    def _of_grid(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [h, w, D] of a grid's patches."""
        side, dinov2 = self.config.vit.positions, self.class_token is not None
        own = self.positions[1:]
        if grid == (side, side):
            return own.view(side, side, -1)
        plane = own.float().view(side, side, -1).permute(2, 0, 1)[None]
        # As published, each: RF-DETR's code smooths where it shrinks.
        resized = functional.interpolate(plane, grid, mode="bicubic", antialias=dinov2)
        return resized[0].permute(1, 2, 0)

    def _windowed(self, tokens: Tensor) -> Tensor:
        """[B, h, w, D] to [B W^2, S, D]."""
        count = self.config.vit.windows
        parts = tokens.unflatten(2, (count, -1)).unflatten(1, (count, -1))  # type: ignore[no-untyped-call]
        return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # type: ignore[no-any-return]

    def _map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, D, h, w] of tokens in the order of windows."""
        if self.norm is not None:
            x = self.norm(x[:, 1:])
        count = self.config.vit.windows
        rows, columns = (side // count for side in grid)
        parts = x.view(-1, count, count, rows, columns, x.shape[-1])
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
