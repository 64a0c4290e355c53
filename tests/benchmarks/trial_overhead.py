"""What a trial of a sweep costs beside its training, in seconds.

    PYTHONPATH=platform:tests python tests/benchmarks/trial_overhead.py [--repetitions 3] [--json F]

The same tiny run, always with another seed so that it is trained anew, is made by

- the bare loop in a process that is up (``launcher="local"`` called in this one),
- the command with ``--launcher local``, from the start of its process to its end,
- the command under Ray Train with one worker, Ray's start and end included,
- ``sweeps/run.py`` with one trial, and with several, one at a time,

in turns, each repetition beginning with another one. A trial costs what several trials take
longer than one, divided by how many there are more; the sweep's start is what is left of one
trial's sweep. MLflow is off. Numbers are medians over repetitions, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tiny_recipe import SECTIONS, tiny_recipe

from benchmarks.scripts import run_script
from d3etr.config.load import load_config
from d3etr.launch.api import launch

TRIALS = 4
RECIPE = tiny_recipe(
    data={
        "digit_scenes": {
            **SECTIONS["data"]["digit_scenes"],
            "train_images": 64,
            "validation_images": 16,
        }
    }
)
ROWS = {
    "loop": "bare loop, in a process that is up",
    "local": "`trainers/run.py --launcher local`",
    "train": "`trainers/run.py`, Ray Train, one worker",
    "one": "`sweeps/run.py`, one trial",
    "several": f"`sweeps/run.py`, {TRIALS} trials one at a time",
    "trial": "**a trial**",
    "over_loop": "a trial beyond the bare loop",
    "start": "a sweep's start and end",
    "ray": "Ray Train beyond `--launcher local`",
}


@dataclass
class Bench:
    """Runs the same training in every way.

    Attributes:
        folder: for everything that is written.
        seed: of the next run.
    """

    folder: Path
    seed: int = field(default=0)

    def ways(self) -> dict[str, Callable[[], float]]:
        """Name to what makes a run that way and returns its seconds."""
        return {
            "loop": self._loop,
            "local": lambda: self._command("--launcher", "local"),
            "train": self._command,
            "one": lambda: self._sweep(1),
            "several": lambda: self._sweep(TRIALS),
        }

    def prepare(self) -> None:
        """Write recipe and scenes, and load what this process needs."""
        (self.folder / "recipe.yaml").write_text(RECIPE)
        self._loop()

    def _places(self) -> list[str]:
        return [f"run.output={self.folder / 'runs'}", f"data.digit_scenes.root={self.folder}"]

    def _seeds(self, count: int) -> list[int]:
        self.seed += count
        return list(range(self.seed - count, self.seed))

    def _loop(self) -> float:
        (seed,) = self._seeds(1)
        settings = [*self._places(), f"run.seed={seed}"]
        config = load_config(self.folder / "recipe.yaml", settings)
        return _seconds(lambda: launch(config, launcher="local", quiet=True))

    def _command(self, *arguments: str) -> float:
        (seed,) = self._seeds(1)
        sets = [f"--set={setting}" for setting in (*self._places(), f"run.seed={seed}")]
        recipe = str(self.folder / "recipe.yaml")
        return _process("trainers/run.py", recipe, *sets, *arguments)

    def _sweep(self, trials: int) -> float:
        seeds = self._seeds(trials)
        tree = {
            "name": f"sweep{seeds[0]}",
            "recipe": str(self.folder / "recipe.yaml"),
            "set": self._places(),
            "seeds": seeds,
            "cases": {"as it is": {}},
            "maximum_concurrent": 1,
        }
        path = self.folder / f"sweep{seeds[0]}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return _process("sweeps/run.py", str(path))


def _process(script: str, *arguments: str) -> float:
    return _seconds(lambda: run_script(script, *arguments))


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(repetitions: int) -> list[dict[str, float]]:
    """Seconds by row, for each repetition."""
    found = []
    with tempfile.TemporaryDirectory(prefix="d3etr-bench-") as folder:
        bench = Bench(Path(folder))
        bench.prepare()
        for number in range(repetitions):
            ways = list(bench.ways().items())
            turn = number % len(ways)
            raw = {name: make() for name, make in (*ways[turn:], *ways[:turn])}
            found.append(raw | derived(raw))
            print(f"{number + 1}/{repetitions}", _rounded(found[-1]), file=sys.stderr, flush=True)
    return found


def derived(raw: Mapping[str, float]) -> dict[str, float]:
    """What follows from one repetition's measurements."""
    trial = (raw["several"] - raw["one"]) / (TRIALS - 1)
    return {
        "trial": trial,
        "over_loop": trial - raw["loop"],
        "start": raw["one"] - trial,
        "ray": raw["train"] - raw["local"],
    }


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in row.items()}


def table(found: list[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = ["| | median, s | lowest to highest, s |", "| --- | ---: | ---: |"]
    for name, title in ROWS.items():
        values = [row[name] for row in found]
        middle = statistics.median(values)
        lines.append(f"| {title} | {middle:.1f} | {min(values):.1f} to {max(values):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a trial of a sweep costs.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure(options.repetitions)
    load = [round(value, 1) for value in os.getloadavg()]
    print(table(found))
    print(f"\n{len(found)} repetitions, {os.cpu_count()} cores, load average at the end {load}")
    if options.json is not None:
        content = {"cores": os.cpu_count(), "load_average": load, "seconds": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
