"""From decoder outputs to detections in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3etr.structures import DecoderOutputs


def top_detections(
    outputs: DecoderOutputs, original_sizes: Sequence[tuple[int, int]], maximum: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of all (query, class) scores of the last layer, as DETR with focal loss does.

    Args:
        outputs: logits [L, B, N, C] and boxes [L, B, N, 4] of the main group.
        original_sizes: B times (height, width) in pixels, the images before any transform.
        maximum: K at most; fewer where N * C is smaller.

    Returns:
        Scores [B, K] in descending order, labels [B, K], and boxes [B, K, 4] as x1, y1, x2, y2
        in pixels, which may reach over the image's edge.
    """
    classes = outputs.logits.shape[-1]
    logits = outputs.logits[-1].flatten(1)
    best, indices = logits.topk(min(maximum, logits.shape[1]), dim=1)
    queries = torch.div(indices, classes, rounding_mode="floor")
    boxes = outputs.boxes_cxcywh[-1].gather(1, queries[..., None].expand(-1, -1, 4))
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], -1)
    return best.sigmoid(), indices % classes, corners * _pixels(original_sizes, corners)


def _pixels(original_sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """[B, 1, 4]: width, height, width, height."""
    sizes = torch.tensor([[w, h, w, h] for h, w in original_sizes], dtype=like.dtype)
    return sizes[:, None].to(like.device, non_blocking=True)
