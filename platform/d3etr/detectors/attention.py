"""Multi-head attention: one core, and what each kind makes queries, keys and values of.

Shapes: B images · N queries (all groups side by side) · H heads · S memory tokens ·
D model width · E channels per head. A leading 1 instead of B means that all images share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.attention_maps import ProductMaps
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.groups import GroupSize, LayerAttention
from d3etr.structures import Memory

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
        exporting = torch.compiler.is_exporting()  # for any size, and runtimes have no fused kernel
        if exporting or (query.device.type == "cpu" and key.shape[-2] <= SMALL_MEMORY):
            return attend_by_products(query, key, value, padding, dropout)
        value = functional.pad(value, (0, query.shape[-1] - width))
    visible = None if padding is None else ~padding[:, None, None]
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout
    )
    return mixed[..., :width].transpose(1, 2).flatten(2)


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, dropout: float
) -> Tensor:
    """The same as ``attend``; the softmax is float32, also under autocast."""
    scores = ProductMaps(query, key, padding).scores()
    weights = functional.dropout(scores.softmax(-1), dropout)
    mixed = weights.to(value.dtype) @ value
    return mixed.transpose(1, 2).flatten(2)


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared: tuple[Tensor, Tensor],
    blocks: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention within equal blocks of one group, each of which also reads keys that all share.

    One softmax over both: the same as under a mask [N, M + N], without most of its products, and
    without a copy of the shared keys for each block. float32 scores, as of ``ProductMaps``.

    Args:
        query: [B, H, N, E], block by block.
        key: likewise.
        value: likewise.
        shared: keys [B, H, M, E] and values [B, H, M, E].
        blocks: K, a divisor of N.
        dropout: probability on the attention weights.

    Returns:
        [B, N, H*E], and scores [B, H, N, N / K] float32 of each query against those of its own
        block.
    """

    def apart(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], blocks, -1, x.shape[-1])

    own_query, own_key, own_value = (apart(x) for x in (query, key, value))
    scores = ProductMaps(query, shared[0]).scores()
    within = ProductMaps(own_query, own_key).scores().flatten(2, 3)
    weights = torch.cat([scores, within], -1).softmax(-1)
    weights = functional.dropout(weights, dropout).to(value.dtype)
    others, own = torch.split(weights, [scores.shape[-1], within.shape[-1]], -1)
    mixed = (apart(own) @ own_value).flatten(2, 3) + others @ shared[1]
    return mixed.transpose(1, 2).flatten(2), within


def attend_apart(query: Tensor, key: Tensor, value: Tensor, blocks: int, dropout: float) -> Tensor:
    """Attention within equal blocks of one group, which see nobody else.

    Arguments and result as of ``attend_in_blocks``.
    """

    def apart(x: Tensor) -> Tensor:
        """[B K, H, N / K, E]."""
        return x.view(*x.shape[:2], blocks, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)

    mixed = attend(apart(query), apart(key), apart(value), None, dropout)  # [B K, N / K, H*E]
    return mixed.view(query.shape[0], -1, mixed.shape[-1])


class MultiHeadAttention(nn.Module):
    """What kinds of attention share; each projects to queries, keys and values in its own way.

    Args:
        config: uses width D, heads H and dropout, which acts on the attention weights.
    """

    output: nn.Linear

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout

    def split(self, x: Tensor) -> Tensor:
        """[B, N, H*E] -> [B, H, N, E]."""
        return split_heads(x, self.heads)

    def within(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sizes: list[GroupSize],
        padding: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Attention of each group among itself, blocks apart; all [B or 1, N, D].

        Blocks also read the first group, which never reads them, unless their size says not.

        Args:
            query: of all groups side by side.
            key: likewise.
            value: likewise.
            sizes: of each group, in the order of N.
            padding: [B, N] bool of one group, or None.
            keep: return what maps are compared by.

        Returns:
            [B or 1, N, D], and that of each group whose maps are kept (or nothing).
        """
        heads = (self.split(x) for x in (query, key, value.expand(query.shape)))
        queries = [size.queries for size in sizes]
        parts = [torch.split(x, queries, 2) for x in heads]
        shared, dropout = (parts[1][0], parts[2][0]), self.dropout if self.training else 0.0
        groups: list[tuple[Tensor, LayerAttention | None]] = []
        for q, k, v, size in zip(*parts, sizes, strict=True):
            if not size.blocks:
                groups.append(self._attend(q, k, v, padding, keep))
            elif size.see_first:
                groups.append(attend_in_blocks(q, k, v, shared, size.blocks, dropout))
            else:
                groups.append((attend_apart(q, k, v, size.blocks, dropout), None))
        mixed = torch.cat([group for group, _ in groups], 1) if len(groups) > 1 else groups[0][0]
        kept = [found for (_, found), size in zip(groups, sizes, strict=True) if keep and size.maps]
        return self.output(mixed), [found for found in kept if found is not None]

    def across(
        self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, keep: bool
    ) -> tuple[Tensor, LayerAttention | None]:
        """All groups' queries read the memory; keys and values are projected once.

        Args:
            query: [B or 1, H, N, E].
            key: [B, H, S, E].
            value: [B, H, S, E'].
            memory: encoder output.
            keep: return what maps are compared by.

        Returns:
            [B, N, D], and that or None.
        """
        query = query.expand(memory.tokens.shape[0], -1, -1, -1)
        mixed, kept = self._attend(query, key, value, memory.padding, keep)
        return self.output(mixed), kept

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, keep: bool
    ) -> tuple[Tensor, LayerAttention | None]:
        """As of ``attend``, and what its maps are computed from, for losses over them."""
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, padding, dropout)
        return mixed, ProductMaps(query, key) if keep else None


class SelfAttention(MultiHeadAttention):
    """Embeddings join queries and keys, not values: tokens of encoders, queries of decoders.

    Args:
        config: as of ``MultiHeadAttention``.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        *,
        sizes: list[GroupSize] | None = None,
        padding: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Mix [B or 1, N, D] states; arguments and result as of ``within``, one group without."""
        query, key = self.query_key(hidden + embedding).chunk(2, -1)
        sizes = [GroupSize(query.shape[1])] if sizes is None else sizes
        return self.within(query, key, self.value(hidden), sizes, padding, keep)


class ConditionalSelfAttention(MultiHeadAttention):
    """Content and position have projections of their own, which are added.

    (arXiv 2108.06152, appendix; the official code's ``sa_*_proj``.)

    Args:
        config: as of ``MultiHeadAttention``.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.content = nn.Linear(width, 3 * width)
        self.position = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, embedding: Tensor, *, sizes: list[GroupSize], keep: bool
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Mix [B or 1, N, D] states within each group; as of ``within``."""
        width = hidden.shape[-1]
        content = self.content(hidden)
        query, key = (content[..., : 2 * width] + self.position(embedding)).chunk(2, -1)
        return self.within(query, key, content[..., 2 * width :], sizes, None, keep)


class CrossAttention(MultiHeadAttention):
    """DETR's: embeddings join queries, positions join keys.

    Args:
        config: as of ``MultiHeadAttention``.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, embedding: Tensor, place: None, memory: Memory, keep: bool
    ) -> tuple[Tensor, LayerAttention | None]:
        """Read the memory from [B or 1, N, D] states, which have no place; as of ``across``."""
        query = self.split(self.query(hidden + embedding))
        key = self.split(self.key(memory.tokens + memory.position))
        return self.across(query, key, self.split(self.value(memory.tokens)), memory, keep)


class ConditionalCrossAttention(MultiHeadAttention):
    """Conditional cross-attention (arXiv 2108.06152, section 3.2).

    Per head, content and spatial parts are concatenated, so that the score is the sum of a
    content and a spatial product. In the first layer, where queries have no content yet, the
    query embedding and the key positions also join the content parts.

    Args:
        config: as of ``MultiHeadAttention``.
        first: whether this is the decoder's first layer.
    """

    def __init__(self, config: DetectorConfig, first: bool) -> None:
        super().__init__(config)
        width = config.width
        self.query_content = nn.Linear(width, width)
        self.query_embedding = nn.Linear(width, width) if first else None
        self.query_spatial = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.key_position = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, embedding: Tensor, place: Tensor, memory: Memory, keep: bool
    ) -> tuple[Tensor, LayerAttention | None]:
        """Read the memory from [B or 1, N, D] states; as of ``across``.

        Args:
            hidden: decoder states.
            embedding: query embeddings [B or 1, N, D].
            place: [B or 1, N, D] sine encoding of reference points, transformed.
            memory: encoder output.
            keep: return what maps are compared by.
        """
        query = self.query_content(hidden)
        if self.query_embedding is not None:
            query = query + self.query_embedding(embedding)
        query = self._join(query, self.query_spatial(place))
        content, value = self.key_value(memory.tokens).chunk(2, -1)
        where = self.key_position(memory.position)
        if self.query_embedding is not None:
            content = content + where
        return self.across(query, self._join(content, where), self.split(value), memory, keep)

    def _join(self, content: Tensor, spatial: Tensor) -> Tensor:
        """[B or 1, N, D] twice -> [B or 1, H, N, 2E], whichever of them is shared."""
        images = max(content.shape[0], spatial.shape[0])
        parts = [self.split(x) for x in (content, spatial)]
        return torch.cat([part.expand(images, -1, -1, -1) for part in parts], -1)
