"""Attention maps of a decoder: what they are computed from, or their scores.

Shapes: L decoder layers · B images · H heads · N queries · P some of them · K keys · E channels of
a query and a key in one head · V feature levels · R points that a query samples on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MASKED_SCORE = torch.finfo(torch.float32).min
"""Attention score of a masked key: finite, so that 0 * score is 0 and not NaN."""


SPREAD = 1e-2
"""Share of a splatted map's mass that is spread evenly over all tokens, as is what was sampled
outside (our choice): where a query samples nothing, its score is low but finite."""


def hidden_by_either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """[B, K] bool: keys that one of two paddings hides, so that both maps are over the rest."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of some queries: [L, B, H, N, X] at [L, B, P] to [L, B, H, P, X]."""
    # Whole rows are copied, where a gather would look up each element.
    layers, batch, heads, queries, width = values.shape
    maps = torch.arange(layers * batch * heads, device=values.device)
    rows = queries * maps.view(layers, batch, heads, 1) + index[:, :, None]
    picked = values.reshape(-1, width).index_select(0, rows.flatten())
    return picked.view(layers, batch, heads, -1, width)


def take_layers(values: Tensor, chosen: Sequence[int]) -> Tensor:
    """Some layers of [L, ...]."""
    # Indexing with a list would make the host wait for its copy to the device.
    return torch.stack([values[layer] for layer in chosen])


@dataclass(frozen=True)
class ProductMaps:
    """Maps whose scores are scaled products of queries and keys.

    Small beside the maps themselves, and cheap to restrict to some queries: a kernel computes a
    map where it is needed, and stores it nowhere.

    Attributes:
        query: [L, B, H, N, E], or of one layer [B, H, N, E].
        key: [L, B, H, K, E], or [B, H, K, E].
        padding: [B, K] bool, True for keys that nobody may look at, or None.
    """

    query: Tensor
    key: Tensor
    padding: Tensor | None = None

    @property
    def scale(self) -> float:
        """Products are multiplied by this."""
        return float(self.query.shape[-1] ** -0.5)

    def scores(self) -> Tensor:
        """[.., B, H, N, K] float32 before the softmax, ``MASKED_SCORE`` under padding.

        Losses need log-softmax, and log(softmax) underflows.
        """
        # float32 also under autocast: MASKED_SCORE has no bfloat16 value, and losses need digits.
        with torch.autocast(self.query.device.type, enabled=False):
            scores = (self.query.float() * self.scale) @ self.key.float().mT
        if self.padding is None:
            return scores
        return scores.masked_fill(self.padding[:, None, None], MASKED_SCORE)

    def of_keys(self) -> ProductMaps:
        """The same maps; gradients reach the keys alone."""
        return replace(self, query=self.query.detach())

    def rows(self, index: Tensor | None) -> ProductMaps:
        """The maps of the queries at [L, B, P]; None takes all."""
        return self if index is None else replace(self, query=take_rows(self.query, index))

    def pairs(self, index: Tensor | None) -> ProductMaps:
        """Self-attention of the queries at [L, B, P] among themselves; None takes all.

        The softmax over what is left renormalises the map to these queries.
        """
        if index is None:
            return self
        return ProductMaps(take_rows(self.query, index), take_rows(self.key, index))

    def hiding(self, padding: Tensor | None) -> ProductMaps:
        """The same maps over keys that ``padding``, [B, K] bool, does not hide either."""
        return replace(self, padding=hidden_by_either(self.padding, padding))

    def layers(self, chosen: Sequence[int]) -> ProductMaps:
        """The maps of some layers."""
        query, key = take_layers(self.query, chosen), take_layers(self.key, chosen)
        return replace(self, query=query, key=key)


@dataclass(frozen=True)
class ScoredMaps:
    """Maps given by their scores.

    Attributes:
        values: [L, B, H, N, K] float32 before the softmax, ``MASKED_SCORE`` under padding.
    """

    values: Tensor

    def scores(self) -> Tensor:
        """As of ``ProductMaps``."""
        return self.values

    def rows(self, index: Tensor | None) -> ScoredMaps:
        """As of ``ProductMaps``."""
        return self if index is None else ScoredMaps(take_rows(self.values, index))

    def pairs(self, index: Tensor | None) -> ScoredMaps:
        """As of ``ProductMaps``."""
        if index is None:
            return self
        pairs, queries = index.shape[-1], self.values.shape[-1]
        cells = (queries * index[..., :, None] + index[..., None, :]).flatten(2)
        cells = cells[:, :, None].expand(-1, -1, self.values.shape[2], -1)
        picked = self.values.flatten(3).gather(3, cells)
        return ScoredMaps(picked.view(*self.values.shape[:3], pairs, pairs))

    def hiding(self, padding: Tensor | None) -> ScoredMaps:
        """As of ``ProductMaps``."""
        if padding is None:
            return self
        return ScoredMaps(self.values.masked_fill(padding[:, None, None], MASKED_SCORE))

    def layers(self, chosen: Sequence[int]) -> ScoredMaps:
        """As of ``ProductMaps``."""
        return ScoredMaps(take_layers(self.values, chosen))


AttentionMaps = ProductMaps | ScoredMaps


@dataclass(frozen=True)
class SampledMaps:
    """Maps of deformable attention: a few weighted points on each feature level.

    Attributes:
        locations: [L, B, H, N, V, R, 2], or of one layer [B, H, N, V, R, 2], as (x, y) relative to
            the padded level; they may lie outside.
        weights: [.., B, H, N, V, R], of a query 1 in all.
        levels: (height, width) of the V grids, together K cells.
        padding: [B, K] bool, True for cells that hold nothing, or None.
    """

    locations: Tensor
    weights: Tensor
    levels: tuple[tuple[int, int], ...]
    padding: Tensor | None = None

    def scores(self) -> Tensor:
        """Scores whose softmax is the splatted map over the cells that hold something.

        [.., B, H, N, K] float32, ``MASKED_SCORE`` under padding.
        """
        maps = self.splatted()
        if self.padding is None:
            count: Tensor | int = maps.shape[-1]
        else:
            hidden = self.padding[:, None, None]
            maps = maps.masked_fill(hidden, 0.0)
            count = (~hidden).sum(-1, keepdim=True)
        lost = 1 - maps.sum(-1, keepdim=True)
        scores = ((1 - SPREAD) * maps + ((1 - SPREAD) * lost + SPREAD) / count).log()
        return scores if self.padding is None else scores.masked_fill(hidden, MASKED_SCORE)

    def splatted(self) -> Tensor:
        """[.., B, H, N, K]: each weight is spread over the four cells that it was read from.

        Rows sum to 1 less what was sampled outside.
        """
        planes = [
            _splatted(self.locations[..., level, :, :], self.weights[..., level, :].float(), *size)
            for level, size in enumerate(self.levels)
        ]
        return torch.cat(planes, -1)

    def rows(self, index: Tensor | None) -> SampledMaps:
        """The maps of the queries at [L, B, P]; None takes all."""
        if index is None:
            return self
        places, weights = (
            take_rows(part.flatten(4), index).view(*part.shape[:3], -1, *part.shape[4:])
            for part in (self.locations, self.weights)
        )
        return replace(self, locations=places, weights=weights)

    def on(self, levels: tuple[tuple[int, int], ...], padding: Tensor | None) -> SampledMaps:
        """The same points over as many other grids, [B, K] of them hidden."""
        return replace(self, levels=levels, padding=padding)

    def hiding(self, padding: Tensor | None) -> SampledMaps:
        """As of ``ProductMaps``."""
        return self.on(self.levels, hidden_by_either(self.padding, padding))

    def layers(self, chosen: Sequence[int]) -> SampledMaps:
        """The maps of some layers."""
        locations, weights = (take_layers(x, chosen) for x in (self.locations, self.weights))
        return replace(self, locations=locations, weights=weights)


def _splatted(locations: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """Points [.., R, 2] with weights [.., R] on one level: [.., height * width]."""
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5  # in cells
    left, top = x.floor(), y.floor()
    plane = weights.new_zeros(*weights.shape[:-1], height * width)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + right, top + below
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside * weights
        index = (row * width + column).long()
        plane = plane.scatter_add(-1, index.where(inside, 0), share)
    return plane


CrossMaps = AttentionMaps | SampledMaps
