"""Sine position encodings of grid cells and of query reference points.

Shapes: B images · S = h*w grid cells · D model width · F = D / 4 frequencies per axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10_000.0
EPSILON = 1e-6


class SineEncoding(nn.Module):
    """DETR's fixed encoding: y in the first half of the channels, x in the second.

    Each axis holds sin and cos of the coordinate at F frequencies, interleaved; coordinates
    are normalised to (0, 2 pi]. Conditional DETR encodes reference points the same way, which
    is what lets a query's spatial part look for a place (arXiv 2108.06152, section 3.3).

    Args:
        width: D, a multiple of 4.
    """

    periods: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(width // 4, dtype=torch.float32) * (4 / width)
        self.register_buffer("periods", TEMPERATURE**exponents, persistent=False)

    def grid(self, grid: tuple[int, int], padding: Tensor | None) -> Tensor:
        """Encode the cells of a grid, row-major.

        Args:
            grid: (h, w).
            padding: [B, h, w] bool, True under padding, or None when no image is padded.

        Returns:
            [B, S, D], or [1, S, D] without padding: all images share it.
        """
        if padding is None:
            return self._shared_grid(*grid)
        valid = (~padding).float()
        y, x = valid.cumsum(1), valid.cumsum(2)
        y = y / (y[:, -1:] + EPSILON)
        x = x / (x[:, :, -1:] + EPSILON)
        return self.points(torch.stack([x, y], -1).flatten(1, 2))

    def _shared_grid(self, height: int, width: int) -> Tensor:
        y = torch.arange(1, height + 1, device=self.periods.device) / (height + EPSILON)
        x = torch.arange(1, width + 1, device=self.periods.device) / (width + EPSILON)
        rows = self._axis(y)[:, None].expand(-1, width, -1)
        columns = self._axis(x)[None].expand(height, -1, -1)
        return torch.cat([rows, columns], -1).view(1, height * width, -1)

    def points(self, points: Tensor) -> Tensor:
        """Encode points.

        Args:
            points: [..., 2] as (x, y), normalised.

        Returns:
            [..., D], float32.
        """
        x, y = self._axis(points.float()).unbind(-2)
        return torch.cat([y, x], -1)

    def _axis(self, coordinates: Tensor) -> Tensor:
        angles = coordinates[..., None] * (2 * math.pi) / self.periods
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
