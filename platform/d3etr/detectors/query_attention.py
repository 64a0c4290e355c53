"""Attention of DETR's decoder: among queries, and of queries to memory.

Shapes: B images · N queries (all groups side by side) · H heads · S memory tokens · D width.
A leading 1 instead of B means that all images share it.
"""

from __future__ import annotations

from torch import Tensor, nn

from d3etr.detectors.attention import attend, attend_and_keep, attend_within, split_heads
from d3etr.detectors.groups import LayerAttention


class QuerySelfAttention(nn.Module):
    """Self-attention within each group; embeddings join queries and keys, not values.

    Args:
        width: D.
        heads: H.
        dropout: probability on the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, embedding: Tensor, sizes: list[int], attention: bool
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Mix each group within itself.

        Args:
            hidden: [B or 1, N, D].
            embedding: [B or 1, N, D].
            sizes: queries of each group, in the order of N.
            attention: return what maps are compared by.

        Returns:
            [B or 1, N, D], and that of each group (or nothing).
        """
        query, key = self.query_key(hidden + embedding).chunk(2, -1)
        value = self.value(hidden).expand(query.shape)
        dropout = self.dropout if self.training else 0.0
        heads = (split_heads(x, self.heads) for x in (query, key, value))
        mixed, kept = attend_within(tuple(heads), sizes, dropout, attention)
        return self.output(mixed), kept


class MemoryAttention(nn.Module):
    """Cross-attention: embeddings join queries, positions join keys.

    Args:
        width: D.
        heads: H.
        dropout: probability on the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        tokens: Tensor,
        position: Tensor,
        padding: Tensor | None,
        attention: bool,
    ) -> tuple[Tensor, LayerAttention | None]:
        """Let all groups' queries read the memory; keys and values are projected once.

        Args:
            hidden: [B or 1, N, D].
            embedding: [B or 1, N, D].
            tokens: [B, S, D] memory.
            position: [B or 1, S, D].
            padding: [B, S] bool or None.
            attention: return what maps are compared by.

        Returns:
            [B, N, D], and that or None.
        """
        query = split_heads(self.query(hidden + embedding), self.heads)
        query = query.expand(len(tokens), -1, -1, -1)
        key = split_heads(self.key(tokens + position), self.heads)
        value = split_heads(self.value(tokens), self.heads)
        dropout = self.dropout if self.training else 0.0
        if attention:
            mixed, kept = attend_and_keep(query, key, value, padding, dropout)
            return self.output(mixed), kept
        return self.output(attend(query, key, value, padding, dropout)), None
