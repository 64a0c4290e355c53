"""The kernel for assignment problems: interpreted where there is no GPU, compiled where there is.

Its pairs cost what scipy's cost; which of several equally cheap assignments it finds is its own.
"""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

pytest.importorskip("triton")

from d3etr.kernels.assignment import LARGEST_SIDE, PRICED, solve, solve_one
from d3etr.kernels.availability import runs_kernels
from d3etr.matching.assignment import (
    CostBlock,
    DeviceSolving,
    NonFiniteCostError,
    Solver,
    assign,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
quiet = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def solved(costs: Tensor, counts: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and doubt on the host, after a look at their form."""
    valid = counts or (costs.shape[3],) * costs.shape[1]
    pairs = [min(costs.shape[2], count) for count in valid]
    number = torch.tensor(valid, dtype=torch.int32, device=DEVICE)
    rows, columns, doubt = (part.cpu() for part in solve(costs.to(DEVICE), number, max(pairs)))
    assert rows.shape == columns.shape == (*costs.shape[:2], max(pairs))
    assert rows.dtype == columns.dtype == torch.int64
    for layer in range(costs.shape[0]):
        for image, (count, valid_columns) in enumerate(zip(pairs, valid, strict=True)):
            used_rows, used_columns = rows[layer, image, :count], columns[layer, image, :count]
            assert (used_rows.diff() > 0).all()
            assert used_columns.unique().numel() == count
            assert ((used_rows >= 0) & (used_rows < costs.shape[2])).all()
            assert ((used_columns >= 0) & (used_columns < valid_columns)).all()
            assert not rows[layer, image, count:].any()
            assert not columns[layer, image, count:].any()
    return rows, columns, doubt


def excess(costs: Tensor, counts: tuple[int, ...] | None = None) -> float:
    """By how much the kernel's assignments cost more than scipy's, the most relative to the sum."""
    rows, columns, doubt = solved(costs, counts)
    assert doubt == 0
    valid, worst = counts or (costs.shape[3],) * costs.shape[1], 0.0
    for layer in range(costs.shape[0]):
        for image, count in enumerate(valid):
            problem = costs[layer, image, :, :count].double()
            pairs = min(problem.shape)
            found = problem[rows[layer, image, :pairs], columns[layer, image, :pairs]]
            best = problem[linear_sum_assignment(problem)]
            difference = float(found.sum() - best.sum()) / max(float(best.abs().sum()), 1e-30)
            worst = max(worst, abs(difference))
    return worst


def random_costs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearly_equal(layers: int, images: int, size: int) -> Tensor:
    """Points that nearly agree: as hard as an untrained decoder's queries."""
    generator = torch.Generator().manual_seed(size)
    points = torch.randn(2, layers, images, size, 3, generator=generator)
    return 3 + 0.01 * torch.cdist(points[0], points[1])


PRICED_SIZE = PRICED.value + 8


@pytest.mark.parametrize(
    ("queries", "width", "counts"),
    [
        (1, 1, None),
        (7, 7, None),
        (9, 4, None),
        (4, 9, None),
        (6, 5, (2, 0, 5)),
        (3, 8, (8, 1, 3)),
        (17, 17, (17, 16, 2)),
        (PRICED_SIZE, PRICED_SIZE, None),
    ],
)
def test_random_costs(queries: int, width: int, counts: tuple[int, ...] | None) -> None:
    images = 1 if counts is None else len(counts)
    assert excess(random_costs(2, images, queries, width), counts) <= 1e-9


@pytest.mark.parametrize("size", [12, PRICED_SIZE])
def test_nearly_equal_costs(size: int) -> None:
    assert excess(nearly_equal(1, 1, size)) <= 1e-9


@pytest.mark.parametrize("value", [0.0, -7.0, 1e30])
@pytest.mark.parametrize("size", [5, PRICED_SIZE])
@quiet
def test_constant_costs(value: float, size: int) -> None:
    assert excess(torch.full((1, 1, size, size), value)) <= 1e-9


@pytest.mark.parametrize("size", [10, PRICED_SIZE])
def test_costs_with_ties(size: int) -> None:
    costs = torch.randint(0, 4, (1, 2, size, size), generator=torch.Generator().manual_seed(0))
    assert excess(costs.float()) == 0


def test_nothing_is_written_beside_the_results() -> None:
    """Programs share memory: what one writes beyond its part is another's."""
    costs, counts = random_costs(2, 3, 6, 5), (2, 0, 5)
    whole = solved(costs, counts)
    for image, count in enumerate(counts):
        alone = solved(costs[:, image : image + 1], (count,))
        pairs = min(6, count)
        assert torch.equal(alone[0][:, 0], whole[0][:, image, :pairs])
        assert torch.equal(alone[1][:, 0], whole[1][:, image, :pairs])
    sizes = {"rows": 30, "columns": 30, "doubts": 6, "shelf": 192}
    types = {"doubts": torch.float32, "shelf": torch.int64}
    rooms = {
        name: torch.full((3, size), -9, dtype=types.get(name, torch.int64), device=DEVICE)
        for name, size in sizes.items()
    }
    solve_one[(6,)](
        costs.to(DEVICE),
        torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        *(room[1] for room in rooms.values()),
        *(3, 6, 5, 5),
        TILED=16,
        BLOCK=16,
    )
    for room in rooms.values():
        assert (room[[0, 2]] == -9).all()


@quiet
def test_costs_whose_squares_no_float_holds() -> None:
    costs = 1e30 * random_costs(1, 1, PRICED_SIZE, PRICED_SIZE)
    assert excess(costs) <= 1e-9


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    offset=st.sampled_from([0.0, -50.0]),
    whole=st.booleans(),
    data=st.data(),
)
def test_any_small_problem(
    rows: int,
    columns: int,
    seed: int,
    scale: float,
    offset: float,
    whole: bool,
    data: st.DataObject,
) -> None:
    costs = random_costs(1, 2, rows, columns, seed=seed)
    costs = scale * (costs.round() if whole else costs) + offset
    counts = (data.draw(st.integers(0, columns)), data.draw(st.integers(0, columns)))
    assert excess(costs, counts) <= 1e-9


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (5, 2)])
def test_brute_force(rows: int, columns: int) -> None:
    costs = random_costs(1, 1, rows, columns)
    found = solved(costs)
    problem = costs[0, 0] if rows <= columns else costs[0, 0].T
    choices = permutations(range(max(rows, columns)), min(rows, columns))
    best = min(float(problem[range(len(choice)), choice].sum()) for choice in choices)
    assert float(costs[0, 0][found[0][0, 0], found[1][0, 0]].sum()) == pytest.approx(best)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("size", "share"), [(6, 0.0), (6, 0.5), (6, 1.0), (PRICED_SIZE, 0.1)])
@quiet
def test_costs_that_are_not_finite_leave_pairs_and_a_doubt(
    value: float, size: int, share: float
) -> None:
    costs = random_costs(1, 2, size, size)
    costs[0, 1] = torch.where(torch.rand(size, size) < share, value, costs[0, 1])
    costs[0, 1, 2, 3] = value
    rows, columns, doubt = solved(costs)
    assert doubt.isnan()
    sound = costs[0, 0].double()
    best = sound[linear_sum_assignment(sound)].sum()
    torch.testing.assert_close(sound[rows[0, 0], columns[0, 0]].sum(), best)


@quiet
def test_padding_that_is_not_finite_is_no_doubt() -> None:
    costs = random_costs(1, 2, 6, 5)
    costs[:, :, :, 3:] = float("nan")
    assert excess(costs, (3, 2)) <= 1e-9


def test_no_objects_at_all() -> None:
    rows, _, doubt = solved(torch.zeros(2, 3, 5, 0), (0, 0, 0))
    assert rows.shape == (2, 3, 0)
    assert doubt == 0


def test_costs_of_any_type_and_order() -> None:
    costs = random_costs(2, 1, 6, 5).requires_grad_()
    rows, columns, _ = solved(costs.transpose(2, 3).bfloat16())
    again = solved(costs.transpose(2, 3).bfloat16().float().contiguous())
    assert torch.equal(rows, again[0]) and torch.equal(columns, again[1])


def blocks() -> list[CostBlock]:
    few, many = random_costs(2, 3, 12, 4), random_costs(3, 3, 12, 12)
    return [
        CostBlock("few", few.to(DEVICE), counts=(4, 0, 2)),
        CostBlock("many", many.to(DEVICE)),
        CostBlock("none", torch.rand(2, 3, 12, 0, device=DEVICE), counts=(0, 0, 0)),
    ]


def test_the_device_says_what_the_host_says() -> None:
    problems = blocks()
    for found, known in zip(DeviceSolving(problems, None).result(), assign(problems), strict=True):
        for part in ("rows", "columns", "valid_mask"):
            assert torch.equal(getattr(found, part), getattr(known, part))
        assert found.counts == known.counts
        assert known.nan_flag is None and found.nan_flag == 0
        found.ensure_finite("these")


@quiet
def test_costs_that_are_not_finite_are_named_where_somebody_looks() -> None:
    costs = torch.full((1, 1, 3, 3), float("nan"), device=DEVICE)
    (found,) = DeviceSolving([CostBlock("students", costs)], None).result()
    with pytest.raises(NonFiniteCostError, match="a cost of students is NaN or infinite"):
        found.ensure_finite("students")


def test_the_cpu_leaves_problems_to_threads() -> None:
    assert not runs_kernels(torch.device("cpu"))


@needs_gpu
def test_a_gpu_solves_what_threads_were_not_asked_for() -> None:
    assert isinstance(Solver().start(blocks()), DeviceSolving)
    assert not isinstance(Solver(threads=1).start(blocks()), DeviceSolving)
    assert not isinstance(Solver().start([]), DeviceSolving)
    large = CostBlock("large", torch.zeros(1, 1, 1, LARGEST_SIDE + 1, device=DEVICE))
    assert not isinstance(Solver().start([large]), DeviceSolving)


@needs_gpu
@pytest.mark.parametrize("size", [300, 900])
def test_hard_problems_of_real_size(size: int) -> None:
    assert excess(nearly_equal(2, 2, size)) <= 1e-9
    assert excess(random_costs(1, 2, size, size), (size, size // 2)) <= 1e-9


@needs_gpu
def test_problems_one_after_the_other_beside_other_work() -> None:
    solver, costs = Solver(), nearly_equal(6, 4, 100).to(DEVICE)
    reference = assign([CostBlock("same", costs)])[0]
    begun = []
    for _ in range(5):
        begun.append(solver.start([CostBlock("same", costs.clone())]))
        torch.rand(2000, 2000, device=DEVICE) @ torch.rand(2000, 2000, device=DEVICE)
    for solving in begun:
        (found,) = solving.result()
        assert torch.equal(found.rows, reference.rows)
        assert torch.equal(found.columns, reference.columns)
