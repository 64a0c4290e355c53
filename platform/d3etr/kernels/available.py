"""Whether kernels can be used."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch


@cache
def solves_assignments(device: torch.device) -> bool:
    """Whether a device solves assignment problems itself: a GPU for which Triton can build.

    Triton also needs a C compiler where it runs, so the first call for a GPU solves a problem.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from d3etr.kernels.assignment import solve

        costs = torch.zeros(1, 1, 1, 1, device=device)
        solve(costs, torch.ones(1, dtype=torch.int32, device=device), 1)
    except Exception as error:  # Triton, its compiler or the machine's: whatever is missing
        warnings.warn(
            f"matching is left to the processor, since Triton builds no kernel here: {error}",
            stacklevel=2,
        )
        return False
    return True
