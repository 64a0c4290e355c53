"""What is arranged differently here, whoever else's names the tensors had."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from d3etr.detectors.imports.renaming import add_or_compare

LAYER = re.compile(r"^decoder\.(?:layers\.)?(\d+)\.")


def decoder_depth(tensors: Mapping[str, Tensor]) -> int:
    """Number of decoder layers L of renamed tensors."""
    layers = [int(match[1]) for match in map(LAYER.match, tensors) if match]
    return max(layers, default=-1) + 1


def settle(tensors: Mapping[str, Tensor], name: str, box_refinement: bool) -> dict[str, Tensor]:
    """Renamed tensors in the shapes and places that our detectors have for them.

    Args:
        tensors: by our names.
        name: our name of the detector.
        box_refinement: Deformable DETR's: whether layers have heads of their own.

    Raises:
        ValueError: heads that all layers share differ.
    """
    if name == "deformable_detr":
        return _deformable(dict(tensors), box_refinement)
    settled = dict(tensors)
    if "projection.weight" in settled:  # a 1x1 convolution there, a linear layer here
        settled["projection.weight"] = settled["projection.weight"].flatten(1)
    return settled


def _deformable(tensors: dict[str, Tensor], box_refinement: bool) -> dict[str, Tensor]:
    """Split position and content of queries, and say whose heads are whose."""
    depth = decoder_depth(tensors)
    if (queries := tensors.pop("queries.weight", None)) is not None:
        halves = queries.chunk(2, -1)
        tensors["query_embedding.weight"], tensors["query_content.weight"] = halves
    settled: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head = re.match(r"^decoder\.(class|box)_heads\.(\d+)\.(.*)$", name)
        ours = name
        if head is not None:
            kind, index, rest = head[1], int(head[2]), head[3]
            if index == depth:  # one more than there are layers: the first stage's
                ours = f"proposals.{kind}_head.{rest}"
            elif not box_refinement:
                ours = f"decoder.{kind}_heads.0.{rest}"
        add_or_compare(settled, ours, tensor, name)
    return settled
