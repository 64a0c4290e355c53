"""One-to-one assignments of minimal cost: every layer, image and purpose as one problem set.

The Hungarian problems of a training step: student against objects, teacher against objects,
student against teacher; all layers and images of each. A GPU solves them itself, beside its other
work, and the host waits for nothing. Elsewhere, and on a GPU without Triton, they travel to the
host in copies that nobody waits for, are solved by a few threads while the device computes what
needs no pairs, and their solutions travel back likewise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d3etr.errors import UserError
from d3etr.kernels.availability import runs_kernels
from d3etr.structures import on_device

MOST_THREADS = 15
"""Beside the caller's: more would wait for each other, since all need Python's lock."""


_WHAT_TO_DO = (
    "a detector's output is not finite. Lower the learning rate, or check the weights it started "
    "from."
)


class NonFiniteCostError(UserError):
    """A matching cost is NaN or infinite: the outputs behind it are."""


@dataclass(frozen=True)
class CostBlock:
    """Equally shaped assignment problems.

    Attributes:
        name: what is matched, for error texts.
        costs: [L, B, N, M].
        counts: valid columns per image; None when all M are.
        objects: [B] int64, the same on the costs' device.
    """

    name: str
    costs: Tensor
    counts: tuple[int, ...] | None = None
    objects: Tensor | None = None

    def columns(self, image: int) -> int:
        """Valid columns of an image."""
        return self.costs.shape[3] if self.counts is None else self.counts[image]

    @property
    def pairs(self) -> tuple[int, ...]:
        """Pairs per image: the smaller side is matched completely."""
        _, batch, queries, _ = self.costs.shape
        return tuple(min(queries, self.columns(image)) for image in range(batch))

    @property
    def max_pairs(self) -> int:
        """Pairs P that any image could have."""
        return min(self.costs.shape[2:])

    def valid_columns(self) -> Tensor:
        """[B] int64 valid columns of each image, on the costs' device."""
        _, batch, _, width = self.costs.shape
        if self.objects is not None:
            return self.objects
        if self.counts is None:
            return torch.full((batch,), width, device=self.costs.device)
        return on_device(torch.tensor(self.counts, dtype=torch.int64), self.costs.device)

    def valid_mask(self) -> Tensor:
        """[B, P] bool, True for slots that hold a pair."""
        slots = torch.arange(self.max_pairs, device=self.costs.device)
        return slots < self.valid_columns()[:, None]


@dataclass(frozen=True)
class Assignment:
    """Pairs (row, column) of each layer and image, rows ascending.

    Attributes:
        rows: [L, B, P] int64, 0 in unused slots.
        columns: [L, B, P] int64, 0 in unused slots.
        counts: pairs per image; slots from there to P are unused. Empty where only the device
            knows.
        valid_mask: [B, P] bool, True for slots in use.
        nan_flag: scalar, 0, or NaN where a cost was not finite and its problem's pairs mean
            nothing: found on a device without a synchronisation. None where the host solved, which
            raises instead.
    """

    rows: Tensor
    columns: Tensor
    counts: tuple[int, ...]
    valid_mask: Tensor
    nan_flag: Tensor | None = None

    def nan_if_invalid(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses over these pairs, the first one NaN if the pairs mean nothing."""
        if self.nan_flag is None or not losses:
            return losses
        first = next(iter(losses))
        return losses | {first: losses[first] + self.nan_flag}

    def ensure_finite(self, name: str) -> None:
        """Wait for the device to say whether the costs were finite.

        Args:
            name: what is matched.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite.
        """
        if self.nan_flag is not None and bool(self.nan_flag.isnan()):
            raise NonFiniteCostError(f"a cost of {name} is NaN or infinite: {_WHAT_TO_DO}")


def gather_queries(values: Tensor, index: Tensor) -> Tensor:
    """Rows of queries: values [L, B, N, K] at index [L, B, P] to [L, B, P, K]."""
    return values.gather(2, index[..., None].expand(*index.shape, values.shape[-1]))


def matched_objects(assignment: Assignment, queries: int) -> Tensor:
    """[L, B, M] int64: the object that each query is matched with, -1 for none.

    Args:
        assignment: queries (rows) to objects (columns).
        queries: M.
    """
    used = assignment.valid_mask[None].expand_as(assignment.rows)
    # Unused slots go to a column of their own.
    rows = assignment.rows.where(used, queries)
    none = rows.new_full((*rows.shape[:2], queries + 1), -1)
    return none.scatter(2, rows, assignment.columns)[..., :-1]


class Solving(Protocol):
    """Problems that are being solved; made by ``Solver.start``."""

    def result(self) -> list[Assignment]:
        """The solutions, once they are needed.

        Returns:
            One assignment per block, on the device of the costs.

        Raises:
            NonFiniteCostError: a cost is NaN or infinite; the text says where. Not raised where
                the device solves: see ``Assignment.nan_flag``.
        """


class HostSolving:
    """Problems that the host solves.

    Args:
        blocks: problems, all on one device.
        pool: its threads begin at once; None leaves all to the thread that asks for the result.
    """

    def __init__(self, blocks: Sequence[CostBlock], pool: ThreadPoolExecutor | None = None) -> None:
        self._blocks = blocks
        self._costs, self._wait = _to_host([block.costs for block in blocks])
        self._begun: dict[tuple[int, int, int], Future[Any] | None] = {
            (number, layer, image): (
                pool.submit(self._solve, number, layer, image) if pool else None
            )
            for number, block in enumerate(blocks)
            for layer in range(block.costs.shape[0])
            for image in range(block.costs.shape[1])
        }

    def result(self) -> list[Assignment]:
        """Wait for the solutions, the calling thread helping; see ``Solving``."""
        if not self._blocks:
            return []
        solutions = [
            np.zeros((2, *block.costs.shape[:2], block.max_pairs), dtype=np.int64)
            for block in self._blocks
        ]
        for (number, layer, image), begun in self._begun.items():
            if begun is None or begun.cancel():
                found = self._solve(number, layer, image)
            else:
                found = begun.result()
            pairs = self._blocks[number].pairs[image]
            solutions[number][:, layer, image, :pairs] = found
        return [
            Assignment(rows, columns, block.pairs, block.valid_mask())
            for (rows, columns), block in zip(
                _to_device(solutions, self._blocks[0].costs.device), self._blocks, strict=True
            )
        ]

    def _solve(self, number: int, layer: int, image: int) -> Any:
        """Row and column indices of one problem."""
        self._wait()
        block = self._blocks[number]
        problem = self._costs[number][layer, image, :, : block.columns(image)]
        if not np.isfinite(problem).all():
            row, column = np.argwhere(~np.isfinite(problem))[0]
            raise NonFiniteCostError(
                f"the cost of {block.name} is {problem[row, column]} in decoder layer {layer}, "
                f"image {image} of the batch, query {row}, column {column}: {_WHAT_TO_DO}"
            )
        return linear_sum_assignment(problem)


class DeviceSolving:
    """Problems that their device solves, on a side stream.

    Args:
        blocks: problems of sizes that ``kernels.assignment`` takes.
        stream: solves; None for the current one.
    """

    def __init__(self, blocks: Sequence[CostBlock], stream: torch.cuda.Stream | None) -> None:
        from d3etr.kernels.assignment import solve

        self._stream = stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            for block in blocks:
                block.costs.record_stream(stream)
        with torch.cuda.stream(stream):
            self._found = []
            for block in blocks:
                found = solve(block.costs, block.valid_columns().int(), block.max_pairs)
                rows, columns, nan_flag = found
                mask = block.valid_mask()
                self._found.append(Assignment(rows, columns, block.pairs, mask, nan_flag))
        self._done = None if stream is None else stream.record_event()

    def result(self) -> list[Assignment]:
        """Let the device's current work wait for the solutions, not the host; see ``Solving``."""
        if self._stream is not None and self._done is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(self._done)
            for found in self._found:
                for part in (found.rows, found.columns, found.valid_mask, found.nan_flag):
                    if part is not None:
                        part.record_stream(current)
        return self._found


Solutions = Callable[[], dict[str, Assignment]]
"""Waits for the assignments, by name of their problem."""


class Solver:
    """Solves assignment problems while the caller works: on their device or on threads.

    Args:
        threads: of the host, besides the caller's, to solve all problems there. None leaves them to
            a GPU that can; else it takes as many threads as PyTorch's leave or, where costs are on
            a GPU and these threads idle, one for each core.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[type[Solver], tuple[int | None]]:
        return Solver, (self.threads,)  # threads and streams can be neither copied nor pickled

    def start(self, blocks: Sequence[CostBlock]) -> Solving:
        """Begin to solve every problem of every block exactly.

        Returns at once. The smaller side of each problem will be matched completely.

        Args:
            blocks: problems [L, B, N, M] each, all on one device.
        """
        if self.threads is None and _suits_device(blocks):
            return DeviceSolving(blocks, self._beside(blocks[0].costs.device))
        threads = self.threads
        if threads is None:
            threads = spare_threads(blocks[0].costs.device) if blocks else 0
        if threads and self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="assignment")
        return HostSolving(blocks, self._pool if threads else None)

    def start_named(self, problems: Mapping[str, CostBlock]) -> Solutions:
        """``start`` for problems by name; what is returned waits for their solutions."""
        solving = self.start(list(problems.values()))
        return lambda: dict(zip(problems, solving.result(), strict=True))

    def close(self) -> None:
        """End the threads; the next problems begin new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        """A stream whose work goes first, since other work will wait for it."""
        if self._stream is None or self._stream.device != device:
            stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            self._stream = stream
        return self._stream


def assign(blocks: Sequence[CostBlock]) -> list[Assignment]:
    """Solve every problem of every block in the calling thread by scipy; see ``Solver.start``.

    Args:
        blocks: problems [L, B, N, M] each, all on one device.

    Returns:
        One assignment per block, on the device of the costs.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite; the text says where.
    """
    return Solver(threads=0).start(blocks).result()


def _suits_device(blocks: Sequence[CostBlock]) -> bool:
    """Whether the costs' device solves problems, and such large ones."""
    if not blocks or not runs_kernels(blocks[0].costs.device):
        return False
    from d3etr.kernels.assignment import LARGEST_SIDE

    return max(max(block.costs.shape[2:]) for block in blocks) <= LARGEST_SIDE


def spare_threads(device: torch.device) -> int:
    """Threads besides the caller's: PyTorch's on a CPU, a GPU's share of the cores elsewhere."""
    if device.type != "cuda":
        return torch.get_num_threads() - 1
    share = (os.cpu_count() or 1) // torch.cuda.device_count()
    return min(max(1, share - 1), MOST_THREADS)


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
