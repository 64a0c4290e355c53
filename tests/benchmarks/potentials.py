"""Numbers that make square assignment problems easy, found on the device that holds the costs.

A one-to-one assignment uses every column once: taking a number off each column makes all
assignments cheaper by the same amount, so the best one stays the best, whatever the numbers are.
Near the optimal prices, an exact solver finds most pairs at first sight. Entropic transport gives
such prices in a fixed number of matrix products, with nothing for the host to wait for: Sinkhorn's
iteration (Cuturi 2013), the temperature falling and prices absorbed (Schmitzer 2019, section 3).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TEMPERATURES, SWEEPS = 8, 6
"""Chosen on costs of trained and untrained detectors, on a busy CPU: 20 sweeps in all left scipy
one to four times the work of these 48."""
FIRST, LAST = 0.3, 0.003
"""Temperatures relative to the costs' standard deviation."""
_TINY = 1e-30


@torch.no_grad()
def potentials(costs: Tensor) -> Tensor:
    """Prices to take off the columns of square assignment problems.

    Args:
        costs: [..., N, N].

    Returns:
        [..., N] float32, finite even where costs are not.
    """
    with torch.autocast(costs.device.type, enabled=False):
        costs = costs.float()
        scale = costs.std((-2, -1), correction=0)[..., None]
        prices = torch.zeros_like(costs[..., 0, :])
        for step in range(TEMPERATURES):
            falling = FIRST * (LAST / FIRST) ** (step / (TEMPERATURES - 1))
            temperature = (falling * scale).clamp(min=_TINY)
            prices = prices + temperature * _sinkhorn(costs - prices[..., None, :], temperature)
    return prices.nan_to_num(0.0, 0.0, 0.0)


def solve_eased(costs: Tensor, pool: ThreadPoolExecutor) -> NDArray[np.int64]:
    """Optimal pairs by scipy in threads, prices taken off before.

    Args:
        costs: [L, B, N, N].
        pool: solves.

    Returns:
        [L, B, 2, N] row and column indices.
    """
    prices = potentials(costs)
    eased = costs.cpu().double() - prices.cpu().double()[..., None, :]
    found = np.stack([*pool.map(linear_sum_assignment, eased.flatten(0, 1).numpy())])
    return found.reshape(*costs.shape[:2], 2, -1)


def _sinkhorn(costs: Tensor, temperature: Tensor) -> Tensor:
    """[..., N] change of prices in units of the temperature [..., 1]."""
    lowest = costs.amin(-1, keepdim=True)
    kernel = ((lowest - costs) / temperature[..., None]).exp()
    columns = torch.ones_like(costs[..., 0, :, None])
    for _ in range(SWEEPS):
        rows = (kernel @ columns).clamp(min=_TINY).reciprocal()
        columns = (kernel.mT @ rows).clamp(min=_TINY).reciprocal()
    return columns[..., 0].log()
