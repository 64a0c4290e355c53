"""Copies of a detector's queries, each of which is matched by itself.

(Group DETR, Chen et al., arXiv 2207.13085.)
"""

from __future__ import annotations

from torch import Tensor

from d3etr.structures import DecoderOutputs


def blocks_as_layers(outputs: DecoderOutputs, blocks: int) -> DecoderOutputs:
    """Outputs of K blocks of queries as those of K times as many layers.

    What is matched and summed over layers is so matched and summed over blocks, too.

    Args:
        outputs: [L, B, N, ..], block by block.
        blocks: K, a divisor of N.

    Returns:
        Logits and boxes [L K, B, N / K, ..] alone.
    """

    def apart(values: Tensor) -> Tensor:
        layers, images, _, size = values.shape
        parts = values.view(layers, images, blocks, -1, size)
        return parts.transpose(1, 2).flatten(0, 1)

    assert not outputs.softmax_classes, "the cross entropy is divided by the queries of one group"
    return DecoderOutputs(
        apart(outputs.logits),
        apart(outputs.boxes_cxcywh),
        levels=outputs.levels,
        padding=outputs.padding,
    )
