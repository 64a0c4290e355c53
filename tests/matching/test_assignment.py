"""Batched assignment by brute force on small problems and against scipy on large ones."""

import pickle
from copy import deepcopy
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d3etr.matching.assignment import Assignment, CostBlock, NonFiniteCostError, Solver, assign


def total(costs: Tensor, assignment: Assignment, layer: int, image: int) -> float:
    count = assignment.counts[image]
    rows = assignment.rows[layer, image, :count]
    columns = assignment.columns[layer, image, :count]
    return float(costs[layer, image, rows, columns].sum())


def cheapest(problem: Tensor) -> float:
    """The minimal cost over every injective mapping of the smaller side."""
    rows, columns = problem.shape
    if rows > columns:
        return cheapest(problem.T)
    return min(
        float(sum(problem[row, column] for row, column in enumerate(choice)))
        for choice in permutations(range(columns), rows)
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_small_problems_are_solved_as_by_brute_force(rows: int, columns: int, seed: int) -> None:
    costs = torch.randn(2, 2, rows, columns, generator=torch.Generator().manual_seed(seed))
    (assignment,) = assign([CostBlock("test", costs)])
    for layer in range(2):
        for image in range(2):
            expected = cheapest(costs[layer, image])
            assert total(costs, assignment, layer, image) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (300, 100), (100, 300)])
def test_large_problems_equal_scipy(rows: int, columns: int) -> None:
    costs = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(0))
    (assignment,) = assign([CostBlock("test", costs)])
    for layer in range(2):
        for image in range(3):
            expected = linear_sum_assignment(costs[layer, image].numpy())
            assert assignment.rows[layer, image].tolist() == expected[0].tolist()
            assert assignment.columns[layer, image].tolist() == expected[1].tolist()


def test_pairs_are_one_to_one_and_rows_ascend() -> None:
    costs = torch.rand(3, 2, 12, 9)
    (assignment,) = assign([CostBlock("test", costs)])
    assert (assignment.rows.diff(dim=-1) > 0).all()
    assert (assignment.columns.sort(-1).values == torch.arange(9)).all()


def test_only_valid_columns_are_used() -> None:
    costs = torch.rand(2, 3, 6, 5)
    costs[:, :, :, 3:] = -100  # tempting, but padding for two of the images
    (assignment,) = assign([CostBlock("test", costs, counts=(2, 0, 5))])
    assert assignment.counts == (2, 0, 5)
    assert assignment.valid_mask.sum(1).tolist() == [2, 0, 5]
    assert (assignment.columns[:, 0, :2] < 2).all()


def test_more_objects_than_queries_leaves_objects_unmatched() -> None:
    (assignment,) = assign([CostBlock("test", torch.rand(1, 1, 3, 7), counts=(7,))])
    assert assignment.counts == (3,)
    assert assignment.rows.tolist() == [[[0, 1, 2]]]


def test_blocks_together_equal_blocks_apart() -> None:
    blocks = [
        CostBlock("a", torch.rand(2, 2, 5, 4), counts=(4, 1)),
        CostBlock("b", torch.rand(3, 2, 6, 6)),
        CostBlock("c", torch.rand(1, 2, 5, 0), counts=(0, 0)),
    ]
    for together, block in zip(assign(blocks), blocks, strict=True):
        (apart,) = assign([block])
        assert torch.equal(together.rows, apart.rows)
        assert torch.equal(together.columns, apart.columns)
        assert torch.equal(together.valid_mask, apart.valid_mask)


def test_a_batch_without_any_object_has_no_pairs() -> None:
    (assignment,) = assign([CostBlock("test", torch.rand(2, 3, 5, 0), counts=(0, 0, 0))])
    assert assignment.rows.shape == (2, 3, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_says_where(value: float) -> None:
    costs = torch.rand(3, 2, 4, 4)
    costs[2, 1, 3, 0] = value
    with pytest.raises(NonFiniteCostError, match=r"cost of students is .* layer 2, image 1 .* 3"):
        assign([CostBlock("students", costs)])


def test_padding_that_is_not_finite_is_ignored() -> None:
    costs = torch.rand(1, 1, 4, 4)
    costs[..., 2:] = float("nan")
    (assignment,) = assign([CostBlock("test", costs, counts=(2,))])
    assert assignment.counts == (2,)


def mixed_blocks() -> list[CostBlock]:
    generator = torch.Generator().manual_seed(1)
    return [
        CostBlock("few", torch.rand(2, 3, 20, 4, generator=generator), counts=(4, 0, 2)),
        CostBlock("many", torch.rand(3, 3, 20, 20, generator=generator)),
        CostBlock("none", torch.rand(2, 3, 20, 0, generator=generator), counts=(0, 0, 0)),
    ]


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_find_what_one_thread_finds(threads: int) -> None:
    solver, blocks = Solver(threads), mixed_blocks()
    begun = [solver.start(blocks) for _ in range(3)]
    for solving in reversed(begun):
        for found, alone in zip(solving.result(), assign(blocks), strict=True):
            assert torch.equal(found.rows, alone.rows)
            assert torch.equal(found.columns, alone.columns)
            assert torch.equal(found.valid_mask, alone.valid_mask)
            assert found.counts == alone.counts


@pytest.mark.parametrize("threads", [0, 3])
def test_of_costs_that_are_not_finite_the_first_is_named(threads: int) -> None:
    blocks = mixed_blocks()
    blocks[1].costs[:] = float("nan")
    blocks[0].costs[1, 2, 0, 1] = float("inf")
    blocks[0].costs[0, 1] = float("nan")  # padding
    solving = Solver(threads).start(blocks)
    with pytest.raises(NonFiniteCostError, match=r"of few is inf in decoder layer 1, image 2"):
        solving.result()


def test_a_solver_can_be_copied_and_pickled() -> None:
    solver = Solver(threads=1)
    solver.start(mixed_blocks()).result()
    for copy in (deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert copy.threads == 1
        assert len(copy.start(mixed_blocks()).result()) == 3


def test_nothing_to_solve() -> None:
    assert Solver().start([]).result() == []
