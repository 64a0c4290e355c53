"""Milliseconds of each contender, taken in turns, so that a slow moment is slow for all."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from d3etr.progress import OnProgress, no_progress

SEED = 0
"""Of the order of contenders in each round."""
WARM_UPS = 3
"""Runs that do not count: kernels are chosen, memory is fetched, graphs are compiled."""


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        milliseconds: of each round, of a whole batch.
        batch: images in it.
        memory: bytes that a run takes at its peak on a GPU, beside the weights; None on a CPU.
    """

    milliseconds: tuple[float, ...]
    batch: int
    memory: int | None

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.milliseconds)

    @property
    def p95(self) -> float:
        """What 95 % of the rounds are not above, by the nearest rank."""
        ordered = sorted(self.milliseconds)
        return ordered[-(-95 * len(ordered) // 100) - 1]

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return 1000 * self.batch / self.median


def measure(
    contenders: Mapping[str, tuple[Callable[[], object], int]],
    device: torch.device,
    rounds: int,
    on_progress: OnProgress = no_progress,
) -> dict[str, Timing]:
    """Time contenders, each round in another order: none always runs after the same one.

    Args:
        contenders: name to what is timed and its images.
        device: where it runs; it is waited for.
        rounds: turns of each.
        on_progress: called with what is done.
    """
    memory = dict[str, int | None]()
    for name, (action, _) in contenders.items():
        on_progress(f"warming up {name}")
        for _ in range(WARM_UPS):
            action()
        memory[name] = _peak(action, device)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    draw = random.Random(SEED)
    for turn in range(rounds):
        on_progress(f"round {turn + 1} of {rounds}")
        for name in draw.sample([*contenders], len(contenders)):
            taken[name].append(_milliseconds(contenders[name][0], device))
    return {
        name: Timing(tuple(values), contenders[name][1], memory[name])
        for name, values in taken.items()
    }


def processor() -> str:
    """Name of the processor, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _milliseconds(action: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    action()
    _wait(device)
    return 1000 * (time.perf_counter() - begun)


def _peak(action: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    resident = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - resident


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
