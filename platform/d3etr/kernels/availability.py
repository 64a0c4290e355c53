"""Whether kernels can be used."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU for which Triton, which PyTorch brings, can build."""
    # What torch.compile traces is built by Triton anyway.
    return device.type == "cuda" and (torch.compiler.is_compiling() or _builds(device))


@cache
def _builds(device: torch.device) -> bool:
    """Triton also needs a C compiler where it runs: the first call for a GPU solves a problem."""
    if find_spec("triton") is None:
        return False
    try:
        from d3etr.kernels.assignment import solve

        costs = torch.zeros(1, 1, 1, 1, device=device)
        solve(costs, torch.ones(1, dtype=torch.int32, device=device), 1)
    except Exception as error:  # Triton, its compiler or the machine's: whatever is missing
        warnings.warn(
            "matching is left to the processor and attention maps are stored, since Triton builds "
            f"no kernel here: {error}",
            stacklevel=2,
        )
        return False
    return True
