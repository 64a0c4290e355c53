"""What a training step of each case of a sweep costs, side by side in one process.

    PYTHONPATH=platform:tests python -m benchmarks.step_costs SWEEP.yaml [--rounds 7] [--steps 10]
        [--json FILE]

Every round makes a few optimiser steps of every case, one case after the other, so that a machine
that is slower for a while is slower for all. Printed: the median over rounds of milliseconds per
step, the smallest and largest, and the ratio to the case that the sweep counts gains from.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.side_by_side import seconds
from d3etr.config.sweep import load_sweep
from d3etr.config.tree import Config
from d3etr.data.allocator import keep_freed_memory
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.step_costs import StepMaker
from d3etr.launch.sweeps.plan import make_plan

WARM_UP_STEPS = 3


class Case(StepMaker):
    """One recipe, ready to make steps.

    Attributes:
        name: for people.
        milliseconds: per step, as ``measure`` finds them.
    """

    def __init__(self, name: str, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, SingleProcess(device), steps=1_000_000)
        self.name = name
        self.milliseconds: list[float] = []

    def run(self, steps: int) -> float:
        """Milliseconds per step, without loading images."""
        batches = self.draw(steps)
        return 1000 * seconds(lambda: self.do(batches), self.device) / steps


def measure(cases: Sequence[Case], rounds: int, steps: int) -> None:
    """Fill every case's ``milliseconds``."""
    for case in cases:
        case.run(WARM_UP_STEPS)
    for _ in range(rounds):
        for case in cases:
            case.milliseconds.append(case.run(steps))


def main() -> None:
    """Measure the cases of a sweep and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of each case in each round")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    sweep = load_sweep(options.sweep)
    plan = make_plan(sweep)
    trials = [trial for trial in plan.trials if trial.seed == sweep.seeds[0]]
    torch.set_num_threads(1)
    keep_freed_memory()
    cases = [Case(str(trial.case), plan.placed(plan.config(trial))) for trial in trials]
    measure(cases, options.rounds, options.steps)
    medians = {case.name: statistics.median(case.milliseconds) for case in cases}
    print("| case | ms per step, median (lowest to highest) | ratio |\n| --- | ---: | ---: |")
    for case in cases:
        base = medians.get(sweep.baseline_of(case.name) or "")
        ratio = "" if base is None else f"{medians[case.name] / base:.2f}"
        low, high = min(case.milliseconds), max(case.milliseconds)
        print(f"| {case.name} | {medians[case.name]:.0f} ({low:.0f} to {high:.0f}) | {ratio} |")
        case.close()
    if options.json:
        numbers = {case.name: case.milliseconds for case in cases}
        content = {"command": sys.argv, "torch": torch.__version__, "milliseconds": numbers}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
