"""Prices taken off columns: any leave the optimum as it is, good ones do the solver's work."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.potentials import potentials, solve_eased
from d3etr.config.distillation import MatchingCostConfig
from d3etr.distillation.correspondence import adaptive_problem
from d3etr.structures import DecoderOutputs

pool = ThreadPoolExecutor(2)


def optimum(problem: Tensor) -> float:
    rows, columns = linear_sum_assignment(problem)
    return float(problem.double()[rows, columns].sum())


def outputs(seed: int, spread: float, queries: int) -> DecoderOutputs:
    """Queries that nearly agree when ``spread`` is small, as an untrained decoder's do."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, 2, queries, 5, generator=generator) - 3
    boxes = spread * torch.randn(2, 2, queries, 4, generator=generator)
    return DecoderOutputs(logits, boxes.sigmoid())


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(1, 24),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, -50.0]),
)
def test_eased_problems_keep_their_optimum(
    size: int, seed: int, scale: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = scale * torch.randn(2, 2, size, size, generator=generator) + offset
    found = solve_eased(costs, pool)
    for layer in range(2):
        for image in range(2):
            problem = costs[layer, image]
            pairs = tuple(found[layer, image])
            assert float(problem.double()[pairs].sum()) == pytest.approx(
                optimum(problem), rel=1e-9, abs=1e-9 * scale
            )


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_decoders_pairs_cost_no_more_than_scipys(spread: float) -> None:
    problem = adaptive_problem(outputs(0, spread, 60), outputs(1, spread, 60), MatchingCostConfig())
    found = solve_eased(problem.costs, pool)
    for layer, image in torch.cartesian_prod(torch.arange(2), torch.arange(2)):
        costs = problem.costs[layer, image]
        pairs = tuple(found[layer, image])
        assert float(costs.double()[pairs].sum()) == pytest.approx(optimum(costs), rel=1e-9)


def test_prices_are_nearly_optimal() -> None:
    """The dual bound, rows' lowest reduced cost plus the prices, comes close to the optimum."""
    costs = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    prices = potentials(costs)
    bounds = (costs - prices[:, None]).amin(2).sum(1) + prices.sum(1)
    for problem, bound in zip(costs, bounds, strict=True):
        assert optimum(problem) * 0.9 < float(bound) <= optimum(problem) + 1e-4


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_prices_are_finite(value: float) -> None:
    costs = torch.full((2, 6, 6), value)
    costs[1, 2:] = 1.0
    assert potentials(costs).isfinite().all()


def test_autocast_changes_no_price() -> None:
    costs = torch.rand(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(potentials(costs), potentials(costs.float()))
        within = potentials(costs)
    assert torch.equal(within, potentials(costs))
