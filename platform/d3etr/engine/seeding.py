"""Random numbers as a pure function of where the run stands.

Nothing random is carried from step to step: before every micro-batch the generators are set
from (seed, step, micro-batch). So a resumed run needs no saved generator state, and may continue
with another number of workers.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A well-mixed 63-bit seed from any whole numbers and words; equal parts give equal seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Set the default generators of the CPU and of ``device``.

    Not ``torch.manual_seed``: without an initialised CUDA that one records a stack trace per
    call, which is more expensive than many a training step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
