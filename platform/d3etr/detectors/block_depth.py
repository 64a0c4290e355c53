"""How deep in a vision transformer each of its parameters stands, for what goes block by block."""

from __future__ import annotations

import re

from torch import nn

_BLOCK = re.compile(r"(?:network\.)?blocks\.(\d+)\.")
_LAST_NORM = re.compile(r"(?:network\.)?norm\.")


def depths(backbone: nn.Module) -> dict[str, int]:
    """Depth of each parameter by its name: 0 of embeddings, k of the k-th block, then the norm.

    Args:
        backbone: whose blocks are called ``blocks`` and whose last norm ``norm``.

    Raises:
        ValueError: it has no blocks.
    """
    names = [name for name, _ in backbone.named_parameters()]
    found = {name: int(match[1]) + 1 for name in names if (match := _BLOCK.match(name))}
    if not found:
        raise ValueError("no parameter of a block: nothing tells how deep one stands")
    last = max(found.values()) + 1
    return {name: found.get(name, last if _LAST_NORM.match(name) else 0) for name in names}
