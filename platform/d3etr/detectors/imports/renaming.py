"""Tensors of another implementation renamed, and fused projections cut or joined.

A scheme lists regular expressions, applied in order to every name, and blocks: projections that
are apart there and one linear layer here, stacked in the order in which they are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Scheme:
    """How one implementation's names become ours.

    Attributes:
        rules: (pattern, replacement), applied in order to every name.
        fused: our linear layer -> their layers that it holds, stacked in this order; all beside
            each other in one module.
        copies: (pattern, replacement), applied to our names: what holds a tensor once more, and
            under which name the other one is.
        dropped: patterns of our names that hold nothing that is learned.
    """

    rules: Rules
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: Rules = ()
    dropped: Sequence[str] = (r"\.num_batches_tracked$",)


def rename(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Every tensor under our names; what no rule knows keeps its own and fails to load.

    Args:
        tensors: of the other implementation.
        scheme: how it names things.

    Raises:
        ValueError: two tensors would get one name and are not the same.
    """
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = _apply(_apply(theirs, scheme.rules), scheme.copies)
        if not any(re.search(pattern, name) for pattern in scheme.dropped):
            add_or_compare(renamed, name, tensor, theirs)
    return _fuse(renamed, scheme.fused)


def add_or_compare(tensors: dict[str, Tensor], name: str, tensor: Tensor, theirs: str) -> None:
    """Add a tensor, or make sure that it is what ``tensors`` has under that name already.

    Args:
        tensors: changed in place.
        name: ours.
        tensor: what ``theirs`` holds.
        theirs: for the error's text.

    Raises:
        ValueError: they differ.
    """
    if name in tensors and not torch.equal(tensors[name], tensor):
        raise ValueError(f"'{theirs}' should hold what '{name}' does, but their values differ")
    tensors[name] = tensor


def split_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the ``in_proj`` blocks of ``nn.MultiheadAttention`` into query, key and value.

    Args:
        tensors: by name; ``X.in_proj_weight`` [3 D, D] and ``X.in_proj_bias`` [3 D] become
            ``X.q_proj.weight`` [D, D] and so on.
    """
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.match(r"^(.*\.)in_proj_(weight|bias)$", name)
        if block is None or len(tensor) % 3:
            apart[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            apart[f"{block[1]}{letter}_proj.{block[2]}"] = part
    return apart


def _apply(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse(tensors: dict[str, Tensor], fused: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    for ours, parts in fused.items():
        module, _, layer = ours.rpartition(".")
        first = re.compile(rf"^(.*\b{re.escape(module)})\.{re.escape(parts[0])}\.(weight|bias)$")
        for match in [match for match in map(first.match, list(tensors)) if match]:
            place, kind = match.groups()
            names = [f"{place}.{part}.{kind}" for part in parts]
            if all(name in tensors for name in names):
                blocks = [tensors.pop(name) for name in names]
                tensors[f"{place}.{layer}.{kind}"] = torch.cat(blocks)
    return tensors
