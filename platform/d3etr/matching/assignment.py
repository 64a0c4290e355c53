"""One-to-one assignments of minimal cost: every layer, image and purpose as one problem set.

The Hungarian problems of a training step (student against objects, teacher against objects,
student against teacher; all layers and images of each) travel to the host in one copy and
their solutions travel back in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d3etr.errors import UserError


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


def _solve_block(block: CostBlock, costs: NDArray[np.float32]) -> NDArray[np.int64]:
    """[2, L, B, P] row and column indices of one block whose costs are on the host."""
    layers, batch, queries, _ = costs.shape
    pairs = [min(queries, block.columns(image)) for image in range(batch)]
    solution = np.zeros((2, layers, batch, max(pairs, default=0)), dtype=np.int64)
    for layer in range(layers):
        for image, count in enumerate(pairs):
            problem = costs[layer, image, :, : block.columns(image)]
            if not np.isfinite(problem).all():
                raise _non_finite(block.name, problem, layer, image)
            solution[:, layer, image, :count] = linear_sum_assignment(problem)
    return solution


def _non_finite(
    name: str, problem: NDArray[np.float32], layer: int, image: int
) -> NonFiniteCostError:
    row, column = np.argwhere(~np.isfinite(problem))[0]
    return NonFiniteCostError(
        f"the cost of {name} is {problem[row, column]} in decoder layer {layer}, image {image} of "
        f"the batch, query {row}, column {column}: a detector's output is not finite. Lower the "
        "learning rate, or check the weights it started from."
    )


def _to_host(blocks: Sequence[CostBlock]) -> list[NDArray[np.float32]]:
    """All cost tensors as arrays, after one device-to-host copy."""
    flat = torch.cat([block.costs.detach().float().flatten() for block in blocks]).cpu().numpy()
    ends = np.cumsum([block.costs.numel() for block in blocks])[:-1]
    parts = np.split(flat, ends)
    return [part.reshape(block.costs.shape) for part, block in zip(parts, blocks, strict=True)]


def _to_device(solutions: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """All index arrays as tensors, after one host-to-device copy."""
    flat = torch.from_numpy(np.concatenate([solution.ravel() for solution in solutions]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = torch.split_with_sizes(flat, [solution.size for solution in solutions])
    return [part.view(s.shape) for part, s in zip(parts, solutions, strict=True)]


def _used_slots(counts: tuple[int, ...], slots: int, device: torch.device) -> Tensor:
    filled = torch.arange(slots)[None] < torch.tensor(counts, dtype=torch.int64)[:, None]
    return filled.to(device, non_blocking=True)


def assign(blocks: Sequence[CostBlock]) -> list[Assignment]:
    """Solve every problem of every block by the Hungarian method (scipy).

    The smaller side of each problem is matched completely.

    Args:
        blocks: problems [L, B, N, M] each, all on one device.

    Returns:
        One assignment per block, on the device of the costs.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite; the text says where.
    """
    if not blocks:
        return []
    solutions = [_solve_block(b, c) for b, c in zip(blocks, _to_host(blocks), strict=True)]
    device = blocks[0].costs.device
    results = []
    for block, indices in zip(blocks, _to_device(solutions, device), strict=True):
        _, batch, queries, _ = block.costs.shape
        counts = tuple(min(queries, block.columns(image)) for image in range(batch))
        used = _used_slots(counts, indices.shape[-1], device)
        results.append(Assignment(indices[0], indices[1], counts, used))
    return results
