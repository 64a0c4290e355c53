"""Linear layers that are one tensor here and several in others' files, or the other way round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FUSED: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("feedforward", "inner", ("gate_proj", "up_proj")),
    (r"blocks\.\d+", "inner", ("gate_proj", "up_proj")),
    ("attention", "query_key", ("q_proj", "k_proj")),
    ("attention", "value", ("v_proj",)),
    ("self_attention", "content", ("q_content_proj", "k_content_proj", "v_proj")),
    ("self_attention", "position", ("q_pos_proj", "k_pos_proj")),
    ("self_attention", "query_key", ("q_proj", "k_proj")),
    ("self_attention", "value", ("v_proj",)),
    ("cross_attention", "key_value", ("k_content_proj", "v_proj")),
    ("cross_attention", "query", ("q_proj",)),
    ("cross_attention", "key", ("k_proj",)),
    ("cross_attention", "value", ("v_proj",)),
)
"""Our module (a pattern), its linear layer, and their layers that this holds, in this order."""


def split_projections(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut [3 D, D] of ``nn.MultiheadAttention`` or of DINOv3 into query, key and value.

    DINOv3's biases count as far as the official code's mask of them says: not for keys.
    """
    apart: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.endswith("qkv.bias_mask"):
            continue
        block = re.match(r"^(.*\.)(?:in_proj_|qkv\.)(weight|bias)$", name)
        if block is None or len(tensor) % 3:
            apart[name] = tensor
            continue
        if (mask := theirs.get(f"{name}_mask")) is not None:
            tensor = tensor.masked_fill(mask == 0, 0.0)
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            apart[f"{block[1]}{letter}_proj.{block[2]}"] = part
    return apart


def fuse_projections(tensors: dict[str, Tensor]) -> None:
    """Stack what is one linear layer here, in place."""
    for module, layer, parts in FUSED:
        first = re.compile(rf"^(.*\.{module})\.{parts[0]}\.(weight|bias)$")
        for match in [match for match in map(first.match, tensors) if match]:
            place, kind = match.groups()
            names = [f"{place}.{part}.{kind}" for part in parts]
            if all(name in tensors for name in names):
                blocks = [tensors.pop(name) for name in names]
                tensors[f"{place}.{layer}.{kind}"] = torch.cat(blocks)
