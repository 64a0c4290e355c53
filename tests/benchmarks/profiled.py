"""What a plain and a D3ETR step spend their time on: ``torch.profiler``'s tables.

PYTHONPATH=platform:tests python -m benchmarks.profiled [--device cpu] [--rows 40] [--smoke]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.problems import Step, random_batch, random_detector
from benchmarks.side_by_side import Scale, wait

WARM_UPS = 2


def profiled(step: Step, device: torch.device, rows: int) -> str:
    """The table of one step, the operations of most time of their own first."""
    for _ in range(WARM_UPS):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        step()
        wait(device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    table: str = found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=rows)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.profiled", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="tiny, only to see that it works")
    options = parser.parse_args(arguments)
    scale = Scale.of(options.device, options.smoke)
    batch = random_batch(scale)
    teacher = random_detector(scale, scale.teacher_backbone, 1)
    for name, teaching in (("plain step", None), ("D3ETR step", teacher)):
        step = Step(random_detector(scale, scale.backbone, 0), teaching, scale, batch)
        print(f"{name}\n{profiled(step, scale.device, options.rows)}", flush=True)


if __name__ == "__main__":
    main()
