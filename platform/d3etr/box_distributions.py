"""Boxes as distributions over their edges, as decoders that refine those give them.

Shapes: B images · L decoder layers · N queries · C classes · K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoxDistributions:
    """Boxes of one query group as distributions over their edges (``detectors/d_fine.py``).

    Attributes:
        corners: [L, B, N, 4, K] logits over the bins of each edge.
        start: [B, N, 4] cxcywh, the boxes whose edges move, outside the graph.
        first_logits: [B, N, C] class logits of the first layer, which know nothing of its edges.
        first_boxes: [B, N, 4] cxcywh, ``start`` within the graph.
    """

    corners: Tensor
    start: Tensor
    first_logits: Tensor
    first_boxes: Tensor

    def of_queries(self, sizes: list[int]) -> list[BoxDistributions]:
        """Those of groups that lie side by side."""
        parts = zip(
            torch.split(self.corners, sizes, 2),
            *(torch.split(x, sizes, 1) for x in (self.start, self.first_logits, self.first_boxes)),
            strict=True,
        )
        return [BoxDistributions(*part) for part in parts]

    def of_first(self, images: int) -> BoxDistributions:
        """Those of the first so many images."""
        first = (x[:images] for x in (self.start, self.first_logits, self.first_boxes))
        return BoxDistributions(self.corners[:, :images], *first)
