"""From decoder outputs to detections in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d3etr.structures import DecoderOutputs, on_device


def top_detections(
    outputs: DecoderOutputs, original_sizes: Sequence[tuple[int, int]], maximum: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest scores of the last layer, chosen as the detectors' authors do.

    Of all (query, class) scores with a sigmoid per class; with a softmax over classes each query
    gives one detection, of its most likely class (DETR).

    Args:
        outputs: logits [L, B, N, C] and boxes [L, B, N, 4] of the main group.
        original_sizes: B times (height, width) in pixels, the images before any transform.
        maximum: K at most; fewer where N * C (with a softmax: N) is smaller.

    Returns:
        Scores [B, K] in descending order, labels [B, K], and boxes [B, K, 4] as x1, y1, x2, y2
        in pixels, which may reach over the image's edge.
    """
    scores, labels, corners = relative_detections(outputs, maximum)
    return scores, labels, corners * _pixels(original_sizes, corners)


def relative_detections(outputs: DecoderOutputs, maximum: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``top_detections``, of boxes relative to their image."""
    logits, queries, labels = _ranked(outputs, maximum)
    boxes = outputs.boxes_cxcywh[-1].gather(1, queries[..., None].expand(-1, -1, 4))
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return logits.sigmoid(), labels, torch.cat([centre - half, centre + half], -1)


def _ranked(outputs: DecoderOutputs, maximum: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in descending order, and the query and class of each, all [B, K]."""
    logits = outputs.logits[-1]
    if outputs.softmax_classes:
        logits, labels = logits.max(-1)
        best, queries = logits.topk(min(maximum, logits.shape[1]), dim=1)
        return best, queries, labels.gather(1, queries)
    classes = logits.shape[-1]
    flat = logits.flatten(1)
    best, indices = flat.topk(min(maximum, flat.shape[1]), dim=1)
    return best, torch.div(indices, classes, rounding_mode="floor"), indices % classes


def _pixels(original_sizes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """[B, 1, 4]: width, height, width, height."""
    sizes = torch.tensor([[w, h, w, h] for h, w in original_sizes], dtype=like.dtype)
    return on_device(sizes[:, None], like.device)
