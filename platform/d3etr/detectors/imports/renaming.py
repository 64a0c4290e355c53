"""Tensors of another implementation renamed, and separate projections joined.

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
        dropped: patterns of our names that hold a copy of something or nothing that is learned.
    """

    rules: Rules
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: Sequence[str] = ()


def rename(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Every tensor under our names; what no rule knows keeps its own and fails to load.

    Args:
        tensors: of the other implementation.
        scheme: how it names things.

    Raises:
        ValueError: two tensors would get one name.
    """
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = _apply(theirs, scheme.rules)
        if any(re.search(pattern, name) for pattern in scheme.dropped):
            continue
        if name in renamed:
            raise ValueError(f"two tensors would be '{name}', one of them '{theirs}'")
        renamed[name] = tensor
    return _fuse(renamed, scheme.fused)


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
