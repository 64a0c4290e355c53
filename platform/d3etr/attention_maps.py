"""Attention maps of a decoder: what they are computed from, or their scores.

Shapes: L decoder layers · B images · H heads · N queries · P some of them · K keys · E channels of
a query and a key in one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MASKED_SCORE = torch.finfo(torch.float32).min
"""Attention score of a masked key: finite, so that 0 * score is 0 and not NaN."""


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

    def layers(self, chosen: Sequence[int]) -> ScoredMaps:
        """As of ``ProductMaps``."""
        return ScoredMaps(take_layers(self.values, chosen))


AttentionMaps = ProductMaps | ScoredMaps
