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
        temperature: the longest period; DAB-DETR's grid has 20 (arXiv 2201.12329, section 4.4).
        centred: encode cells by their centres, as Deformable DETR does, and not by their far
            edges, as the others do.
    """

    periods: Tensor

    def __init__(self, width: int, temperature: float = TEMPERATURE, centred: bool = False) -> None:
        super().__init__()
        exponents = torch.arange(width // 4, dtype=torch.float32) * (4 / width)
        self.register_buffer("periods", temperature**exponents, persistent=False)
        self.shift = 0.5 if centred else 0.0

    def grid(self, grid: tuple[int, int], padding: Tensor | None) -> Tensor:
        """Encode the cells of a grid, row-major.

        Args:
            grid: (h, w).
            padding: [B, h, w] bool, True under padding, or None when no image is padded.

        Returns:
            [B, S, D], or [1, S, D] without padding: all images share it.
        """
        height, width = grid
        valid = torch.ones(1, *grid, device=self.periods.device)
        if padding is not None:
            valid = (~padding).float()
        # Images are padded at the right and bottom: the first column and row tell their size.
        y, x = (
            (cells - self.shift) / (cells[:, -1:] + EPSILON)
            for cells in (valid[:, :, 0].cumsum(1), valid[:, 0].cumsum(1))
        )
        rows = self._axis(y)[:, :, None].expand(-1, -1, width, -1)
        columns = self._axis(x)[:, None].expand(-1, height, -1, -1)
        return torch.cat([rows, columns], -1).flatten(1, 2)

    def points(self, points: Tensor) -> Tensor:
        """Encode points, or boxes.

        Args:
            points: [..., 2] as (x, y), or [..., 4] as (x, y, width, height), normalised.

        Returns:
            [..., D], float32; of boxes [..., 2 D], width and height behind the point.
        """
        x, y, *sides = self._axis(points.float()).unbind(-2)
        return torch.cat([y, x, *sides], -1)

    def in_order(self, values: Tensor) -> Tensor:
        """Encode numbers in [0, 1] one after the other: [..., k] to float32 [..., k D / 2]."""
        return self._axis(values.float()).flatten(-2)

    def _axis(self, coordinates: Tensor) -> Tensor:
        angles = coordinates[..., None] * (2 * math.pi) / self.periods
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
