"""KL divergence of attention maps that are stored nowhere, neither forth nor back.

A row needs its map only as sums over keys: those of exp(s), exp(t) and exp(t) (t - s), s and t the
student's and the teacher's scores. They are taken tile by tile, the largest score so far taken off,
as in flash attention (Dao et al. 2022). The backward pass computes tiles anew.

Shapes: L layers · B images · H heads · P pairs (rows of the maps) · K keys · E channels of the
student's queries and keys, E' of the teacher's. Programs see the L B H maps as one
dimension, ``index``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d3etr.attention_maps import ProductMaps, hidden_by_either

ROWS, KEYS = 64, 64
"""Of a tile."""
WARPS = 4
"""Of each program."""
_LOWEST = tl.constexpr(-1e30)
"""Below every score; finite, so that a tile without a valid key makes no NaN."""


def map_divergence(student: ProductMaps, teacher: ProductMaps) -> Tensor:
    """KL(teacher || student) of each row, with a gradient for the student alone.

    Keys that either hides are in neither map.

    Args:
        student: [L, B, H, P, E] queries and [L, B, H, K, E] keys.
        teacher: the same rows and keys in as many heads, with E' channels.

    Returns:
        [L, B, H, P] float32.
    """
    parts = (student.query, student.key, teacher.query.detach(), teacher.key.detach())
    hidden = hidden_by_either(student.padding, teacher.padding)
    rows: Tensor = _MapDivergence.apply(*parts, hidden)
    return rows


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        parts = [part.contiguous() for part in (query, key, teacher_query, teacher_key)]
        logsums = query.new_empty((2, *query.shape[:4]), dtype=torch.float32)
        found = torch.empty_like(logsums[0])
        rows, keys = query.shape[3], key.shape[3]
        maps = query.shape[:3].numel()
        _forward[(maps, triton.cdiv(rows, ROWS))](
            *parts, padding, found, *logsums, rows, keys, *_sizes(parts[0], parts[2]),
            **_constants(parts, padding),
        )  # fmt: skip
        ctx.save_for_backward(*parts, padding, logsums)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        *parts, padding, logsums = ctx.saved_tensors
        query, key = parts[:2]
        rows, keys = query.shape[3], key.shape[3]
        maps = query.shape[:3].numel()
        given = (*parts, padding, gradient.contiguous(), *logsums)
        sizes = (rows, keys, *_sizes(parts[0], parts[2]))
        constants = _constants(parts, padding)
        of_query, of_key = torch.empty_like(query), torch.empty_like(key)
        _backward_query[(maps, triton.cdiv(rows, ROWS))](*given, of_query, *sizes, **constants)
        _backward_key[(maps, triton.cdiv(keys, KEYS))](*given, of_key, *sizes, **constants)
        return of_query, of_key, None, None, None


def _sizes(query: Tensor, teacher_query: Tensor) -> tuple[int, int, int, int, float, float]:
    """Images, heads, widths of both and what products of each are multiplied by."""
    width, teacher_width = query.shape[-1], teacher_query.shape[-1]
    return query.shape[1], query.shape[2], width, teacher_width, width**-0.5, teacher_width**-0.5


def _constants(parts: list[Tensor], padding: Tensor | None) -> dict[str, Any]:
    widths = (max(16, triton.next_power_of_2(part.shape[-1])) for part in (parts[0], parts[2]))
    return {
        "PADDED": padding is not None,
        "ROWS": ROWS,
        "KEYS": KEYS,
        **dict(zip(("WIDTH", "TEACHER_WIDTH"), widths, strict=True)),
        "num_warps": WARPS,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _load(
    base: tl.tensor,
    index: tl.tensor,
    lines: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """Lines of one map's queries or keys: [len(lines), WIDTH], zero beyond both ends."""
    channels = tl.arange(0, WIDTH)
    places = base + (index * count + lines[:, None]) * width + channels[None, :]
    return tl.load(places, mask=(lines[:, None] < count) & (channels[None, :] < width), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _product(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Left times right, float32; never tf32, whose ten bits are too few for scores."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _visible(
    padding: tl.tensor,
    index: tl.tensor,
    columns: tl.tensor,
    keys: tl.tensor,
    images: tl.tensor,
    heads: tl.tensor,
    PADDED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """[len(columns)] whether a key is there and may be looked at."""
    inside = columns < keys
    if PADDED:
        image = (index // heads) % images
        hidden = tl.load(padding + image * keys + columns, mask=inside, other=1)
        inside = inside & (hidden == 0)
    return inside


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    query: tl.tensor,
    key: tl.tensor,
    teacher_query: tl.tensor,
    teacher_key: tl.tensor,
    padding: tl.tensor,
    found: tl.tensor,
    logsums: tl.tensor,
    teacher_logsums: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    images: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    teacher_width: tl.tensor,
    scale: tl.tensor,
    teacher_scale: tl.tensor,
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TEACHER_WIDTH: tl.constexpr,  # noqa: N803
) -> None:
    """Divergence and both log-sums of a tile of rows."""
    index = tl.program_id(0).to(tl.int64)
    lines = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    asked = _load(query, index, lines, rows, width, WIDTH)
    teacher_asked = _load(teacher_query, index, lines, rows, teacher_width, TEACHER_WIDTH)
    top, teacher_top = tl.full([ROWS], _LOWEST, tl.float32), tl.full([ROWS], _LOWEST, tl.float32)
    total, teacher_total = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    apart = tl.zeros([ROWS], tl.float32)
    for start in range(0, keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        visible = _visible(padding, index, columns, keys, images, heads, PADDED)[None, :]
        part = _load(key, index, columns, keys, width, WIDTH)
        teacher_part = _load(teacher_key, index, columns, keys, teacher_width, TEACHER_WIDTH)
        s = _product(asked, tl.trans(part)) * scale
        t = _product(teacher_asked, tl.trans(teacher_part)) * teacher_scale
        higher = tl.maximum(top, tl.max(tl.where(visible, s, _LOWEST), 1))
        teacher_higher = tl.maximum(teacher_top, tl.max(tl.where(visible, t, _LOWEST), 1))
        weight = tl.where(visible, tl.exp(s - higher[:, None]), 0.0)
        teacher_weight = tl.where(visible, tl.exp(t - teacher_higher[:, None]), 0.0)
        teacher_fall = tl.exp(teacher_top - teacher_higher)
        total = total * tl.exp(top - higher) + tl.sum(weight, 1)
        teacher_total = teacher_total * teacher_fall + tl.sum(teacher_weight, 1)
        apart = apart * teacher_fall + tl.sum(teacher_weight * (t - s), 1)
        top, teacher_top = higher, teacher_higher
    logsum, teacher_logsum = top + tl.log(total), teacher_top + tl.log(teacher_total)
    places, inside = index * rows + lines, lines < rows
    tl.store(found + places, apart / teacher_total - teacher_logsum + logsum, mask=inside)
    tl.store(logsums + places, logsum, mask=inside)
    tl.store(teacher_logsums + places, teacher_logsum, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _of_scores(
    asked: tl.tensor,
    keys: tl.tensor,
    teacher_asked: tl.tensor,
    teacher_keys: tl.tensor,
    gradient: tl.tensor,
    logsum: tl.tensor,
    teacher_logsum: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    teacher_scale: tl.tensor,
) -> tl.tensor:
    """Gradient of a tile of products before scaling: scaled difference of both maps."""
    s = _product(asked, tl.trans(keys)) * scale
    t = _product(teacher_asked, tl.trans(teacher_keys)) * teacher_scale
    difference = tl.exp(s - logsum[:, None]) - tl.exp(t - teacher_logsum[:, None])
    difference = tl.where(visible[None, :], difference, 0.0)
    return difference * (gradient * scale)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _backward_query(
    query: tl.tensor,
    key: tl.tensor,
    teacher_query: tl.tensor,
    teacher_key: tl.tensor,
    padding: tl.tensor,
    gradient: tl.tensor,
    logsums: tl.tensor,
    teacher_logsums: tl.tensor,
    of_query: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    images: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    teacher_width: tl.tensor,
    scale: tl.tensor,
    teacher_scale: tl.tensor,
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TEACHER_WIDTH: tl.constexpr,  # noqa: N803
) -> None:
    """Gradient of a tile of queries, over all keys."""
    index = tl.program_id(0).to(tl.int64)
    lines = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places, inside = index * rows + lines, lines < rows
    asked = _load(query, index, lines, rows, width, WIDTH)
    teacher_asked = _load(teacher_query, index, lines, rows, teacher_width, TEACHER_WIDTH)
    given = tl.load(gradient + places, mask=inside, other=0.0)
    logsum = tl.load(logsums + places, mask=inside, other=0.0)
    teacher_logsum = tl.load(teacher_logsums + places, mask=inside, other=0.0)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, keys, KEYS):
        columns = start + tl.arange(0, KEYS)
        visible = _visible(padding, index, columns, keys, images, heads, PADDED)
        part = _load(key, index, columns, keys, width, WIDTH)
        teacher_part = _load(teacher_key, index, columns, keys, teacher_width, TEACHER_WIDTH)
        products = _of_scores(
            asked,
            part,
            teacher_asked,
            teacher_part,
            given,
            logsum,
            teacher_logsum,
            visible,
            scale,
            teacher_scale,
        )
        summed += _product(products.to(part.dtype), part)
    channels = tl.arange(0, WIDTH)[None, :]
    kept = inside[:, None] & (channels < width)
    tl.store(of_query + places[:, None] * width + channels, summed.to(asked.dtype), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_key(
    query: tl.tensor,
    key: tl.tensor,
    teacher_query: tl.tensor,
    teacher_key: tl.tensor,
    padding: tl.tensor,
    gradient: tl.tensor,
    logsums: tl.tensor,
    teacher_logsums: tl.tensor,
    of_key: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    images: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    teacher_width: tl.tensor,
    scale: tl.tensor,
    teacher_scale: tl.tensor,
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TEACHER_WIDTH: tl.constexpr,  # noqa: N803
) -> None:
    """Gradient of a tile of keys, over all queries."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    visible = _visible(padding, index, columns, keys, images, heads, PADDED)
    part = _load(key, index, columns, keys, width, WIDTH)
    teacher_part = _load(teacher_key, index, columns, keys, teacher_width, TEACHER_WIDTH)
    summed = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, rows, ROWS):
        lines = start + tl.arange(0, ROWS)
        places, inside = index * rows + lines, lines < rows
        asked = _load(query, index, lines, rows, width, WIDTH)
        teacher_asked = _load(teacher_query, index, lines, rows, teacher_width, TEACHER_WIDTH)
        given = tl.load(gradient + places, mask=inside, other=0.0)
        logsum = tl.load(logsums + places, mask=inside, other=0.0)
        teacher_logsum = tl.load(teacher_logsums + places, mask=inside, other=0.0)
        products = _of_scores(
            asked,
            part,
            teacher_asked,
            teacher_part,
            given,
            logsum,
            teacher_logsum,
            visible,
            scale,
            teacher_scale,
        )
        summed += _product(tl.trans(products.to(asked.dtype)), asked)
    channels = tl.arange(0, WIDTH)[None, :]
    kept = (columns < keys)[:, None] & (channels < width)
    places = (index * keys + columns)[:, None] * width + channels
    tl.store(of_key + places, summed.to(part.dtype), mask=kept)
