"""Boxes as distributions over where their edges are (D-FINE, Peng et al., arXiv 2410.13842).

What they mean is in ``matching/edges.py``.

Shapes: L decoder layers · B images · N queries · C classes · K bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoxDistributions:
    """Boxes of one query group as distributions over their edges.

    Attributes:
        corners: [L, B, N, 4, K] logits over the bins of each edge.
        start: [B, N, 4] cxcywh, the boxes whose edges move, outside the graph.
        first_logits: [B, N, C] class logits of the first layer, which know nothing of its edges.
        first_boxes: [B, N, 4] cxcywh, ``start`` within the graph.
        distances: [K] distance that each bin stands for, rising.
        curvature: what sides of ``start`` are divided by to give the distances' unit.
    """

    corners: Tensor
    start: Tensor
    first_logits: Tensor
    first_boxes: Tensor
    distances: Tensor
    curvature: float

    def map(
        self, of_layers: Callable[[Tensor], Tensor], of_boxes: Callable[[Tensor], Tensor]
    ) -> BoxDistributions:
        """A part of them.

        Args:
            of_layers: takes it of [L, B, N, 4 K].
            of_boxes: takes it of [B, N, ..].
        """
        start, logits, boxes = (of_boxes(x) for x in self._of_boxes())
        corners = of_layers(self.corners.flatten(3))
        corners = corners.reshape(*corners.shape[:3], *self.corners.shape[3:])
        return replace(self, corners=corners, start=start, first_logits=logits, first_boxes=boxes)

    def of_queries(self, sizes: list[int]) -> list[BoxDistributions]:
        """Those of groups that lie side by side."""
        parts = (torch.split(x, sizes, 1) for x in self._of_boxes())
        return [
            replace(self, corners=corners, start=start, first_logits=logits, first_boxes=boxes)
            for corners, start, logits, boxes in zip(
                torch.split(self.corners, sizes, 2), *parts, strict=True
            )
        ]

    def of_first(self, images: int) -> BoxDistributions:
        """Those of the first so many images."""
        return self.map(lambda corners: corners[:, :images], lambda boxes: boxes[:images])

    def _of_boxes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start, self.first_logits, self.first_boxes
