"""Between the grids of a padded batch and an image's own at their top left, as views are stored.

Shapes: V feature levels · S tokens of all levels · n queries · R sampled points on a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3etr.structures import Levels

Values = NDArray[Any]


def own_tokens(tokens: Values, levels: Levels, own: Levels) -> Values:
    """Tokens [S, ...] of a batch's levels to those of an image's own."""
    parts, begin = [], 0
    for (height, width), (h, w) in zip(levels, own, strict=True):
        plane = tokens[begin : begin + height * width].reshape(height, width, *tokens.shape[1:])
        parts.append(plane[:h, :w].reshape(h * w, *tokens.shape[1:]))
        begin += height * width
    return np.concatenate(parts)


def batch_tokens(parts: Sequence[Values], own: Sequence[Levels], levels: Levels) -> Values:
    """Tokens of each image's own levels to [B, S, ...] of a batch's, zero where there are none."""
    total = sum(math.prod(level) for level in levels)
    whole = np.zeros((len(parts), total, *parts[0].shape[1:]), dtype=parts[0].dtype)
    for place, part, grids in zip(whole, parts, own, strict=True):
        begin = taken = 0
        for (height, width), (h, w) in zip(levels, grids, strict=True):
            plane = place[begin : begin + height * width].reshape(height, width, *part.shape[1:])
            plane[:h, :w] = part[taken : taken + h * w].reshape(h, w, *part.shape[1:])
            begin, taken = begin + height * width, taken + h * w
    return whole


def moved_locations(locations: Values, levels: Levels, target: Levels) -> Values:
    """Places [.., V, R, 2] as (x, y), relative to levels, to such relative to others."""
    factor = np.array(levels, dtype=np.float32) / np.array(target, dtype=np.float32)
    moved: Values = locations * factor[:, None, ::-1].astype(locations.dtype)
    return moved


def moved_tokens(index: Values, levels: Levels, target: Levels) -> Values:
    """Numbers [n] of tokens over all levels to their numbers over others."""
    areas = np.cumsum([0, *(math.prod(level) for level in levels)])
    starts = np.cumsum([0, *(math.prod(level) for level in target)])
    level = np.searchsorted(areas, index, side="right") - 1
    row, column = np.divmod(index - areas[level], np.array(levels)[level, 1])
    moved: Values = starts[level] + row * np.array(target)[level, 1] + column
    return moved
