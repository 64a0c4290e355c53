"""A vision transformer's parameters layer by layer, for what goes by depth."""

from __future__ import annotations

import re

from torch import nn

_BLOCK = re.compile(r"(?:network\.)?blocks\.(\d+)\.")
_LAST_NORM = re.compile(r"(?:network\.)?norm\.")


def layers_of(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of the embeddings, of each block, and of the last norm, which may have none.

    Args:
        backbone: whose blocks are called ``blocks`` and whose last norm ``norm``.

    Raises:
        ValueError: it has no blocks.
    """
    named = list(backbone.named_parameters())
    depths = [int(match[1]) + 1 for name, _ in named if (match := _BLOCK.match(name))]
    if not depths:
        raise ValueError("no parameter of a block: nothing tells how deep one stands")
    layers: list[list[nn.Parameter]] = [[] for _ in range(max(depths) + 2)]
    for name, parameter in named:
        block = _BLOCK.match(name)
        depth = int(block[1]) + 1 if block else -1 if _LAST_NORM.match(name) else 0
        layers[depth].append(parameter)
    return layers
