"""Assignment problems solved where their costs are: one program for each, and nobody waits.

Every program assigns the rows of its problem, the smaller side, one after the other along shortest
augmenting paths (Jonker and Volgenant 1987), in whole numbers of 64 bits, so its pairs cost what
scipy's cost, up to N times 2^-37 of the largest cost. A one-to-one assignment of a square problem
uses every column once: taking a price off each column leaves the best assignment the best. Prices
that are nearly optimal make most rows find their column at first sight. They come from entropic
transport: Sinkhorn's iteration (Cuturi 2013), the temperature falling and prices absorbed
(Schmitzer 2019, section 3).

Shapes: N queries · M columns of the costs · n rows to assign, m >= n columns to choose from: the
smaller and the larger of N and an image's valid columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 16
"""Of each program."""
LARGEST_SIDE = 2048
"""Beyond it a program's vectors no longer fit its registers."""
TILE = 8192
"""Costs that a sweep holds at a time."""

TEMPERATURES = tl.constexpr(8)
SWEEPS = tl.constexpr(6)
FIRST = tl.constexpr(0.3)
"""Highest temperature, relative to the costs' standard deviation."""
FALL = tl.constexpr(0.01 ** (1 / 7))
"""Of each temperature to the one before: the last is a hundredth of the first."""
PRICED = tl.constexpr(32)
"""Rows beyond which prices are worth their sweeps."""

_INDEX_BITS = tl.constexpr(14)
_INDEX = tl.constexpr((1 << 14) - 1)
_COST_BITS = tl.constexpr(38)
"""Costs are whole numbers below 2 to this power, the largest at least half of it: a total is wrong
by less than N times 2^-37 of the largest cost."""
_NAME_BITS = tl.constexpr(12)
_COLUMN = tl.constexpr((1 << 11) - 1)
_OWNED = tl.constexpr(1 << 11)
_FAR = tl.constexpr(1 << 50)
"""Distances start here: 4,096 times the largest cost, twice it for each of 2,048 steps."""
_CLOSED = tl.constexpr((1 << 63) - 1)
_TINY = tl.constexpr(1e-30)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


def solve(costs: Tensor, counts: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match the smaller side of each problem completely at minimal cost.

    Args:
        costs: [L, B, N, M], no side longer than ``LARGEST_SIDE``.
        counts: [B] int32, valid columns of each image, on the costs' device.
        pairs: P, the most pairs that an image has.

    Returns:
        Rows and columns of the pairs, [L, B, P] int64, rows ascending, 0 in unused slots; and a
        float32 scalar, 0 or, where a valid cost is not finite, NaN: the pairs of such a problem are
        one-to-one but mean nothing.
    """
    costs = costs.detach().float().contiguous()
    layers, images, queries, width = costs.shape
    rows, columns = costs.new_zeros((2, layers, images, pairs), dtype=torch.int64)
    doubts = costs.new_zeros(layers * images)
    if rows.numel():
        block = max(16, triton.next_power_of_2(max(queries, width)))
        prices = costs.new_empty((len(doubts), 2, block), dtype=torch.int64)
        with torch.cuda.device_of(costs):  # type: ignore[no-untyped-call]
            solve_one[(len(doubts),)](
                *(costs, counts, rows, columns, doubts, prices, images, queries, width, pairs),
                TILED=max(1, TILE // block),
                BLOCK=block,
                num_warps=WARPS,
            )
    return rows, columns, doubts.sum()


@triton.jit(do_not_specialize=["images", "queries", "width", "pairs"])  # type: ignore[untyped-decorator]
def solve_one(
    costs: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    doubts: tl.tensor,
    shelf: tl.tensor,
    images: tl.tensor,
    queries: tl.tensor,
    width: tl.tensor,
    pairs: tl.tensor,
    TILED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """The problem of one layer and image.

    Args:
        costs: [problems, N, M].
        counts: [images] valid columns.
        rows: [problems, P], filled.
        columns: [problems, P], filled.
        doubts: [problems], filled: 0 or NaN.
        shelf: [problems, 2, BLOCK] int64, where threads look up each other's prices and owners.
        images: problem p is one of image p modulo this.
        queries: N.
        width: M.
        pairs: P.
        TILED: rows of a tile.
        BLOCK: power of two that holds N and M.
    """
    problem = tl.program_id(0)
    count = tl.load(counts + problem % images)
    turned = count < queries  # columns of the matrix are what is assigned
    n, m = tl.minimum(count, queries), tl.maximum(count, queries)
    down, along = tl.where(turned, 1, width), tl.where(turned, width, 1)
    costs += problem.to(tl.int64) * queries * width
    spread, largest, doubt = _spread(costs, n, m, down, along, TILED, BLOCK)
    tl.store(doubts + problem, doubt)

    shelf += problem * 2 * BLOCK
    prices = tl.zeros([BLOCK], tl.float32)
    # Of a problem that is not square, columns that stay free must end with a price of 0.
    if (n == m) & (n > PRICED) & (spread > 0):
        prices = _prices(costs, n, m, down, along, spread, TILED, BLOCK)
    unit = _unit(largest)
    owners = _assign(costs, n, m, down, along, unit, _whole(prices, unit), shelf, BLOCK)

    cells = tl.arange(0, BLOCK)
    used = owners >= 0
    slots = tl.where(turned, tl.cumsum(used.to(tl.int32), 0) - 1, owners)
    slots += problem * pairs
    tl.store(rows + slots, tl.where(turned, cells, owners).to(tl.int64), mask=used)
    tl.store(columns + slots, tl.where(turned, owners, cells).to(tl.int64), mask=used)


@triton.jit  # type: ignore[untyped-decorator]
def _spread(
    costs: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    along: tl.tensor,
    TILED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Standard deviation of the costs, the largest in size; 0, or NaN where one is not finite."""
    lines, cells = tl.arange(0, TILED)[:, None], tl.arange(0, BLOCK)[None, :]
    middle = tl.load(costs, mask=n > 0, other=0.0)  # squares of differences to it are exact enough
    sums = tl.zeros([TILED, BLOCK], tl.float32)
    squares = tl.zeros([TILED, BLOCK], tl.float32)
    largest = tl.zeros([TILED, BLOCK], tl.float32)
    odd = tl.zeros([TILED, BLOCK], tl.int32)
    for start in range(0, n, TILED):
        inside = (start + lines < n) & (cells < m)
        part = tl.load(costs + (start + lines) * down + cells * along, mask=inside, other=0.0)
        finite = tl.abs(part) <= _LARGEST_FLOAT
        odd += tl.where(finite, 0, 1)
        largest = tl.maximum(largest, tl.where(finite, tl.abs(part), 0.0))
        difference = tl.where(inside, part - middle, 0.0)
        sums += difference
        squares += difference * difference
    count = tl.maximum(n * m, 1).to(tl.float32)
    mean = tl.sum(tl.sum(sums, 1), 0) / count
    variance = tl.sum(tl.sum(squares, 1), 0) / count - mean * mean
    doubt = tl.where(tl.sum(tl.sum(odd, 1), 0) > 0, float("nan"), 0.0)
    return tl.sqrt(tl.maximum(variance, 0.0)), tl.max(tl.max(largest, 1), 0), doubt


@triton.jit  # type: ignore[untyped-decorator]
def _unit(largest: tl.tensor) -> tl.tensor:
    """The power of two that brings the largest cost to ``_COST_BITS`` bits; exact, unlike exp2."""
    power = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 64)
    return ((-power + 253 + _COST_BITS) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _whole(costs: tl.tensor, unit: tl.tensor) -> tl.tensor:
    """Costs as whole numbers, in which sums and comparisons are exact; 0 where not finite."""
    scaled = costs * unit
    return tl.where(tl.abs(scaled) <= _LARGEST_FLOAT, scaled, 0.0).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _prices(
    costs: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    along: tl.tensor,
    spread: tl.tensor,
    TILED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """[BLOCK] float32 prices of the columns of a square problem, nearly optimal, always finite."""
    prices = tl.zeros([BLOCK], tl.float32)
    temperature = FIRST * spread
    for _stage in range(TEMPERATURES):
        for _sweep in range(SWEEPS):
            shares = _shares(costs, n, m, down, along, prices, temperature, TILED, BLOCK)
            prices -= temperature * tl.log(tl.maximum(shares, _TINY))
        temperature *= FALL
    return tl.where(tl.abs(prices) <= _LARGEST_FLOAT, prices, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _shares(
    costs: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    along: tl.tensor,
    prices: tl.tensor,
    temperature: tl.tensor,
    TILED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """[BLOCK] what each column gets when each row spreads 1 by a softmax of prices minus costs."""
    lines, cells = tl.arange(0, TILED)[:, None], tl.arange(0, BLOCK)[None, :]
    cold = 1 / temperature
    shares = tl.zeros([TILED, BLOCK], tl.float32)
    for start in range(0, n, TILED):
        inside = (start + lines < n) & (cells < m)
        part = tl.load(costs + (start + lines) * down + cells * along, mask=inside, other=0.0)
        scores = tl.where(cells < m, (prices[None, :] - part) * cold, float("-inf"))
        powers = tl.exp(scores - tl.max(scores, 1)[:, None])
        shares += tl.where(inside, powers * (1 / tl.sum(powers, 1))[:, None], 0.0)
    return tl.sum(shares, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _assign(
    costs: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    along: tl.tensor,
    unit: tl.tensor,
    prices: tl.tensor,
    shelf: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """[BLOCK] int32 row that each column is assigned to, -1 for none.

    At each step, costs less prices are as low as they get in their row where a row is assigned.
    """
    cells = tl.arange(0, BLOCK)
    owners = tl.full([BLOCK], -1, tl.int32)
    for row in range(0, n):
        tl.store(shelf + cells, prices)
        tl.store(shelf + BLOCK + cells, owners.to(tl.int64))
        tl.debug_barrier()
        prices, back, column = _shortest_path(
            costs, row, m, down, along, unit, prices, shelf, owners, BLOCK
        )
        # Every row of the path takes the column that it was left by; at the end stands ``row``.
        while column >= 0:
            step = tl.sum(tl.where(cells == column, back, 0), 0)
            owners = tl.where(cells == column, step >> _INDEX_BITS, owners)
            column = (step & _INDEX) - 1
    return owners


@triton.jit  # type: ignore[untyped-decorator]
def _shortest_path(
    costs: tl.tensor,
    row: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    along: tl.tensor,
    unit: tl.tensor,
    prices: tl.tensor,
    shelf: tl.tensor,
    owners: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Dijkstra's search from a row to the nearest free column.

    It ends after at most n steps whatever the costs are: every one closes a column that is
    assigned, and there is always a free one left.

    Returns:
        New prices [BLOCK], how each column was reached [BLOCK] (the row, and 1 + the column that
        this row is assigned to, 0 for the first), and the free column.
    """
    cells = tl.arange(0, BLOCK)
    # Distance and name in one number: one reduction finds the nearest column and whether it is
    # assigned. Of equally near columns the free ones come first: that ends the search.
    names = (cells + tl.where(owners >= 0, _OWNED, 0)).to(tl.int64)
    distances = tl.full([BLOCK], _FAR, tl.int64)
    nearest = tl.full([], 0, tl.int64)
    surplus = tl.full([], 0, tl.int64)
    back = (tl.zeros([BLOCK], tl.int32) + row) << _INDEX_BITS
    closed = cells >= m
    here = tl.zeros([], tl.int32) + row
    column = tl.full([], -1, tl.int32)
    searching = here >= 0
    while searching:
        line = tl.load(costs + here * down + cells * along, mask=cells < m, other=0.0)
        reached = _whole(line, unit) - prices - surplus
        better = (reached < distances) & (closed == 0)
        distances = tl.where(better, reached, distances)
        back = tl.where(better, (here << _INDEX_BITS) + column + 1, back)

        ahead = tl.where(closed, _CLOSED, (distances << _NAME_BITS) + names)
        first = tl.min(ahead, 0)
        nearest = first >> _NAME_BITS
        column = (first & _COLUMN).to(tl.int32)
        searching = (first & _OWNED) > 0
        owner = tl.load(shelf + BLOCK + column).to(tl.int32)
        here = tl.where(searching, owner, here)
        closed = closed | ((cells == column) & searching)
        owned = tl.load(costs + here * down + column * along)
        surplus = _whole(owned, unit) - tl.load(shelf + column) - nearest
    prices += tl.where(closed & (cells < m), distances - nearest, 0)
    return prices, back, column
