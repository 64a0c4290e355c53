"""Attention cores: encoder self-attention, decoder self-attention, conditional cross-attention.

Shapes: B images · N queries (all groups side by side) · H heads · S memory tokens ·
D model width · E channels per head. A leading 1 instead of B means that all images share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.attention_maps import ProductMaps
from d3etr.detectors.groups import LayerAttention, QueryKey
from d3etr.kernels.availability import runs_kernels

SMALL_MEMORY = 256
"""Keys up to which plain matrix products beat the CPU's fused attention on padded values."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*E] -> [B, H, N, E]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout: float
) -> Tensor:
    """Scaled dot-product attention without materialised maps.

    Args:
        query: [B, H, N, E].
        key: [B, H, S, E].
        value: [B, H, S, E'].
        padding: [B, S] bool, True for keys that nobody may look at, or None.
        dropout: probability on the attention weights.

    Returns:
        [B, N, H*E'].
    """
    width = value.shape[-1]
    if width != query.shape[-1]:
        # Fused kernels want one width (cuDNN's fails with two): widen with zeros, or do without
        # where that costs more.
        if query.device.type == "cpu" and key.shape[-2] <= SMALL_MEMORY:
            return attend_with_scores(query, key, value, padding, dropout)[0]
        value = functional.pad(value, (0, query.shape[-1] - width))
    visible = None if padding is None else ~padding[:, None, None]
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout
    )
    return mixed[..., :width].transpose(1, 2).flatten(2)


def attend_with_scores(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same as ``attend``, with its scores.

    Returns:
        [B, N, H*E'] and [B, H, N, S] float32, also under autocast, as is the softmax: those of
        ``ProductMaps``, so that losses over either are the same.
    """
    scores = ProductMaps(query, key, padding).scores()
    weights = functional.dropout(scores.softmax(-1), dropout)
    mixed = weights.to(value.dtype) @ value
    return mixed.transpose(1, 2).flatten(2), scores


def attend_and_keep(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout: float
) -> tuple[Tensor, LayerAttention]:
    """The same as ``attend``, with what its maps are compared by.

    Where kernels run, these are queries and keys: maps are computed in the loss and stored
    nowhere. Elsewhere they are the scores, which cost more to compute again than to keep.
    """
    if runs_kernels(query.device):
        return attend(query, key, value, padding, dropout), QueryKey(query, key)
    return attend_with_scores(query, key, value, padding, dropout)


def attend_within(
    heads: tuple[Tensor, ...], sizes: list[int], dropout: float, attention: bool
) -> tuple[Tensor, list[LayerAttention]]:
    """Attention of each query group among itself.

    Args:
        heads: query, key and value, each [B, H, N, E].
        sizes: queries of each group, in the order of N.
        dropout: probability on the attention weights.
        attention: return what maps are compared by.

    Returns:
        [B, N, H*E], and that of each group (or nothing).
    """
    mixed: list[Tensor] = []
    kept: list[LayerAttention] = []
    parts = (torch.split(x, sizes, 2) for x in heads)
    for query, key, value in zip(*parts, strict=True):
        if attention:
            group, own = attend_and_keep(query, key, value, None, dropout)
            kept.append(own)
        else:
            group = attend(query, key, value, None, dropout)
        mixed.append(group)
    return torch.cat(mixed, 1) if len(mixed) > 1 else mixed[0], kept


class EncoderSelfAttention(nn.Module):
    """DETR's encoder attention: positions join queries and keys, not values.

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

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Mix [B, S, D] tokens whose positions are [B or 1, S, D]; returns [B, S, D]."""
        query, key = self.query_key(tokens + position).chunk(2, -1)
        query, key = split_heads(query, self.heads), split_heads(key, self.heads)
        value = split_heads(self.value(tokens), self.heads)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(query, key, value, padding, dropout))  # type: ignore[no-any-return]


class DecoderSelfAttention(nn.Module):
    """Self-attention among the queries of each group, groups apart.

    Content and position have projections of their own, which are added
    (arXiv 2108.06152, appendix; the official code's ``sa_*_proj``).

    Args:
        width: D.
        heads: H.
        dropout: probability on the attention weights.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.content = nn.Linear(width, 3 * width)
        self.position = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, embedding: Tensor, sizes: list[int], attention: bool
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Mix each group within itself.

        Args:
            hidden: [B, N, D] or [1, N, D].
            embedding: [B, N, D] or [1, N, D].
            sizes: queries of each group, in the order of N.
            attention: return what maps are compared by.

        Returns:
            [B, N, D] or [1, N, D], and that of each group (or nothing).
        """
        width = hidden.shape[-1]
        content = self.content(hidden)
        query, key = (content[..., : 2 * width] + self.position(embedding)).chunk(2, -1)
        value = content[..., 2 * width :].expand(query.shape)
        dropout = self.dropout if self.training else 0.0
        heads = (split_heads(x, self.heads) for x in (query, key, value))
        mixed, kept = attend_within(tuple(heads), sizes, dropout, attention)
        return self.output(mixed), kept


class ConditionalCrossAttention(nn.Module):
    """Conditional cross-attention (arXiv 2108.06152, section 3.2).

    Per head, content and spatial parts are concatenated, so that the score is the sum of a
    content and a spatial product. In the first layer, where queries have no content yet, the
    query embedding and the key positions also join the content parts.

    Args:
        width: D.
        heads: H.
        dropout: probability on the attention weights.
        first: whether this is the decoder's first layer.
    """

    def __init__(self, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_content = nn.Linear(width, width)
        self.query_embedding = nn.Linear(width, width) if first else None
        self.query_spatial = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.key_position = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        spatial: Tensor,
        tokens: Tensor,
        position: Tensor,
        padding: Tensor | None,
        attention: bool,
    ) -> tuple[Tensor, LayerAttention | None]:
        """Let all groups' queries read the memory; keys and values are projected once.

        Args:
            hidden: [B or 1, N, D] decoder state.
            embedding: [B or 1, N, D] query embedding.
            spatial: [B or 1, N, D] sine encoding of reference points, transformed.
            tokens: [B, S, D] memory.
            position: [B or 1, S, D] position encoding of the memory.
            padding: [B, S] bool or None.
            attention: return what maps are compared by.

        Returns:
            [B, N, D], and that or None.
        """
        query = self._queries(hidden, embedding, spatial)
        key, value = self._keys_and_values(tokens, position)
        query = query.expand(len(tokens), -1, -1, -1)
        dropout = self.dropout if self.training else 0.0
        if attention:
            mixed, kept = attend_and_keep(query, key, value, padding, dropout)
            return self.output(mixed), kept
        return self.output(attend(query, key, value, padding, dropout)), None

    def _queries(self, hidden: Tensor, embedding: Tensor, spatial: Tensor) -> Tensor:
        """[B or 1, H, N, 2E]: content and spatial part of each head."""
        content = self.query_content(hidden)
        if self.query_embedding is not None:
            content = content + self.query_embedding(embedding)
        return self._join(content, self.query_spatial(spatial))

    def _keys_and_values(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, S, 2E] keys and [B, H, S, E] values."""
        content, value = self.key_value(tokens).chunk(2, -1)
        where = self.key_position(position)
        if self.query_embedding is not None:
            content = content + where
        return self._join(content, where), split_heads(value, self.heads)

    def _join(self, content: Tensor, spatial: Tensor) -> Tensor:
        """[B or 1, N, D] twice -> [B or 1, H, N, 2E], whichever of them is shared."""
        images = max(len(content), len(spatial))
        parts = [split_heads(x, self.heads) for x in (content, spatial)]
        return torch.cat([part.expand(images, -1, -1, -1) for part in parts], -1)
