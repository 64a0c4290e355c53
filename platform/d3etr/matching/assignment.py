"""One-to-one assignments of minimal cost: every layer, image and purpose as one problem set.

The Hungarian problems of a training step (student against objects, teacher against objects,
student against teacher; all layers and images of each) travel to the host in one copy that nobody
waits for, are solved by a few threads while the device computes what needs no pairs, and their
solutions travel back in one copy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d3etr.errors import UserError
from d3etr.structures import on_device

MOST_THREADS = 15
"""Beside the caller's: more would wait for each other, since all need Python's lock."""


class NonFiniteCostError(UserError):
    """A matching cost is NaN or infinite: the outputs behind it are."""


@dataclass(frozen=True)
class CostBlock:
    """Equally shaped assignment problems.

    Attributes:
        name: what is matched, for error texts.
        costs: [L, B, N, M].
        counts: valid columns per image; None when all M are.
    """

    name: str
    costs: Tensor
    counts: tuple[int, ...] | None = None

    def columns(self, image: int) -> int:
        """Valid columns of an image."""
        return self.costs.shape[3] if self.counts is None else self.counts[image]

    @property
    def pairs(self) -> tuple[int, ...]:
        """Pairs per image: the smaller side is matched completely."""
        _, batch, queries, _ = self.costs.shape
        return tuple(min(queries, self.columns(image)) for image in range(batch))


@dataclass(frozen=True)
class Assignment:
    """Pairs (row, column) of each layer and image, rows ascending.

    Attributes:
        rows: [L, B, P] int64, 0 in unused slots.
        columns: [L, B, P] int64, 0 in unused slots.
        counts: pairs per image; slots from there to P are unused.
        used: [B, P] bool, True for slots in use.
    """

    rows: Tensor
    columns: Tensor
    counts: tuple[int, ...]
    used: Tensor


def gather_queries(values: Tensor, index: Tensor) -> Tensor:
    """Rows of queries: values [L, B, N, K] at index [L, B, P] to [L, B, P, K]."""
    return values.gather(2, index[..., None].expand(*index.shape, values.shape[-1]))


class Solving:
    """Problems that are being solved; made by ``Solver.start``.

    Threads take one problem after the other from a common list, the largest first.
    """

    def __init__(self, blocks: Sequence[CostBlock]) -> None:
        self._blocks = blocks
        self._costs, self._wait = _to_host([block.costs for block in blocks])
        self._solutions = [_room(block) for block in blocks]
        places = [
            (number, layer, image)
            for number, block in enumerate(blocks)
            for layer in range(block.costs.shape[0])
            for image in range(block.costs.shape[1])
        ]
        self._open = deque(sorted(places, key=lambda place: -blocks[place[0]].costs[0, 0].numel()))
        self._errors: dict[tuple[int, int, int], NonFiniteCostError] = {}
        self._helpers: list[Future[None]] = []

    def help_by(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """Let some of the pool's threads begin."""
        self._helpers = [pool.submit(self._work) for _ in range(min(threads, len(self._open)))]

    def result(self) -> list[Assignment]:
        """Wait for the solutions, the calling thread helping.

        Returns:
            One assignment per block, on the device of the costs.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite; the text says where.
        """
        if not self._blocks:
            return []
        self._work()
        for helper in self._helpers:
            helper.result()
        if self._errors:
            raise self._errors[min(self._errors)]
        device = self._blocks[0].costs.device
        found = _to_device(self._solutions, device)
        return [
            Assignment(rows, columns, block.pairs, _used_slots(block.pairs, device))
            for (rows, columns), block in zip(found, self._blocks, strict=True)
        ]

    def _work(self) -> None:
        """Solve what nobody has taken yet."""
        self._wait()
        while True:
            try:
                place = self._open.popleft()
            except IndexError:
                return
            self._solve(*place)

    def _solve(self, number: int, layer: int, image: int) -> None:
        block = self._blocks[number]
        problem = self._costs[number][layer, image, :, : block.columns(image)]
        if not np.isfinite(problem).all():
            error = _non_finite(block.name, problem, layer, image)
            self._errors[number, layer, image] = error
            return
        solution = linear_sum_assignment(problem)
        self._solutions[number][:, layer, image, : block.pairs[image]] = solution


class Solver:
    """Solves assignment problems on threads of its own while the caller goes on.

    Args:
        threads: beside the caller's; None takes what PyTorch's threads leave or, where costs are
            on a GPU and these threads idle, one for each core.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[Solver], tuple[int | None]]:
        return Solver, (self.threads,)  # threads can be neither copied nor pickled

    def start(self, blocks: Sequence[CostBlock]) -> Solving:
        """Begin to solve every problem of every block by the Hungarian method (scipy).

        Returns at once. The smaller side of each problem will be matched completely.

        Args:
            blocks: problems [L, B, N, M] each, all on one device.
        """
        solving = Solving(blocks)
        threads = _helpers(blocks) if self.threads is None else self.threads
        if threads:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="assignment")
            solving.help_by(self._pool, threads)
        return solving


def assign(blocks: Sequence[CostBlock]) -> list[Assignment]:
    """Solve every problem of every block in the calling thread; see ``Solver.start``.

    Args:
        blocks: problems [L, B, N, M] each, all on one device.

    Returns:
        One assignment per block, on the device of the costs.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite; the text says where.
    """
    return Solver(threads=0).start(blocks).result()


def _helpers(blocks: Sequence[CostBlock]) -> int:
    """Threads beside the caller's: PyTorch's on a CPU, a GPU's share of the cores elsewhere."""
    if not blocks or not blocks[0].costs.is_cuda:
        return torch.get_num_threads() - 1
    share = (os.cpu_count() or 1) // torch.cuda.device_count()
    return min(max(1, share - 1), MOST_THREADS)


def _room(block: CostBlock) -> NDArray[np.int64]:
    """[2, L, B, P] zeros for the row and column indices of a block."""
    layers, batch = block.costs.shape[:2]
    return np.zeros((2, layers, batch, max(block.pairs, default=0)), dtype=np.int64)


def _non_finite(
    name: str, problem: NDArray[np.float32], layer: int, image: int
) -> NonFiniteCostError:
    row, column = np.argwhere(~np.isfinite(problem))[0]
    return NonFiniteCostError(
        f"the cost of {name} is {problem[row, column]} in decoder layer {layer}, image {image} of "
        f"the batch, query {row}, column {column}: a detector's output is not finite. Lower the "
        "learning rate, or check the weights it started from."
    )


def _to_host(costs: Sequence[Tensor]) -> tuple[list[NDArray[np.float32]], Callable[[], None]]:
    """Cost tensors as arrays, and what waits until they are filled."""
    costs = [part.detach().float() for part in costs]
    if not costs or not costs[0].is_cuda:
        return [part.cpu().numpy() for part in costs], lambda: None
    flat = torch.cat([part.flatten() for part in costs])
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    pinned.copy_(flat, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(costs[0].device))
    parts = torch.split_with_sizes(pinned, [part.numel() for part in costs])
    arrays = [part.view(like.shape).numpy() for part, like in zip(parts, costs, strict=True)]
    return arrays, copied.synchronize


def _to_device(solutions: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """All index arrays as tensors, after one host-to-device copy."""
    flat = torch.from_numpy(np.concatenate([solution.ravel() for solution in solutions]))
    parts = torch.split_with_sizes(
        on_device(flat, device), [solution.size for solution in solutions]
    )
    return [part.view(s.shape) for part, s in zip(parts, solutions, strict=True)]


def _used_slots(pairs: tuple[int, ...], device: torch.device) -> Tensor:
    slots = torch.arange(max(pairs, default=0))
    return on_device(slots[None] < torch.tensor(pairs, dtype=torch.int64)[:, None], device)
