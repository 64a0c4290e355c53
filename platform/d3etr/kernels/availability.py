"""Where kernels can run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU, with the Triton that PyTorch brings on Linux."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
