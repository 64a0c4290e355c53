"""What Ray Train costs beside the bare loop, and what a checkpoint costs the training.

Both runs are the same recipe, by `trainers/run.py`: one worker of Ray Train, and `--launcher
local`. Steps are so short here (64-pixel images) that an overhead would show.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.scripts import run_script
from benchmarks.side_by_side import Comparison, Scale, seconds, wait
from d3etr.engine.checkpoints import BackgroundSaver, CheckpointStore, State
from d3etr.engine.journal import Record, read_journal

RUNNER, RECIPE = "trainers/run.py", "trainers/recipes/digits/plain.yaml"
BATCH = 8
STEPS, SMOKE_STEPS = 150, 20
UNSTEADY = 1 / 4
"""Of the steps, that do not count."""
ROUNDS = 3
LOCAL, RAY, TWO = "bare loop", "Ray Train, one worker", "Ray Train, two workers"
ARGUMENTS = {
    LOCAL: ("--launcher", "local"),
    RAY: (),
    # As many images for each worker: the work of a step grows with the workers.
    TWO: ("--set=cluster.workers=2", f"--set=optimisation.batch_size={2 * BATCH}"),
}
PARAMETERS, SMOKE_PARAMETERS, TENSORS = 41_000_000, 400_000, 400
"""A student with ResNet-50."""
SYNC, WAITED, WRITTEN = "saved on the training path", "beside: training waits", "beside: written"


def compare(scale: Scale) -> list[Comparison]:
    """Steady state and start under Ray Train, two workers beside one; a checkpoint."""
    return [*overhead(scale), checkpoint(scale)]


@dataclass
class Runs:
    """The same training under each launcher.

    Attributes:
        folder: for everything that is written.
        steps: of a run.
        seed: of the next run.
        speeds: images per second of steady steps.
        starts: seconds from the command to the first step's preparations.
    """

    folder: Path
    steps: int
    seed: int = 0
    speeds: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in ARGUMENTS})
    starts: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in ARGUMENTS})

    def settings(self) -> list[str]:
        """One epoch, one evaluation, no tracking."""
        return [
            f"run.output={self.folder / 'runs'}",
            f"run.name=seed{self.seed}",
            f"run.seed={self.seed}",
            f"data.digit_scenes.root={self.folder}",
            f"data.digit_scenes.train_images={2 * self.steps * BATCH}",
            "data.digit_scenes.validation_images=50",
            "data.digit_scenes.test_images=1",
            f"optimisation.steps={self.steps}",
            f"evaluation.every_steps={self.steps}",
            "evaluation.test=false",
            "optimisation.schedule.warmup_steps=0",
            "tracking.enabled=false",
        ]

    def measure(self, name: str) -> None:
        """One run."""
        begun = time.time()
        run_script(RUNNER, RECIPE, *(f"--set={s}" for s in self.settings()), *ARGUMENTS[name])
        (journal,) = (self.folder / "runs").glob(f"seed{self.seed}-*/journal.jsonl")
        records = read_journal(journal)
        self.seed += 1
        self.starts[name].append(records[0]["time"] - begun)
        self.speeds[name].append(steady(records, self.steps) * (2 if name == TWO else 1))


def steady(records: list[Record], steps: int) -> float:
    """Images per second after the first steps, without evaluation and checkpoints."""
    images, taken, last = 0, 0.0, 0
    for record in records:
        if record["kind"] != "step":
            continue
        made, last = record["step"] - last, record["step"]
        if last - made >= UNSTEADY * steps:
            images += made * BATCH
            taken += made * record["metrics"]["time/step"]
    return images / taken


def overhead(scale: Scale) -> list[Comparison]:
    """Both launchers, in turns; the first run of each, which makes the scenes, does not count."""
    steps = SMOKE_STEPS if scale.smoke else STEPS
    title = f"{steps} plain steps of {BATCH} digit scenes, under Ray Train and without"
    if find_spec("ray") is None:
        return [Comparison(title, "-", {}, notes=("Ray is not installed: not measured.",))]
    with tempfile.TemporaryDirectory(prefix="d3etr-bench-") as folder:
        Runs(Path(folder), steps).measure(LOCAL)
        runs = Runs(Path(folder), steps, seed=1)
        for number in range(1 if scale.smoke else ROUNDS):
            names = [LOCAL, RAY]
            for name in names if number % 2 == 0 else reversed(names):
                runs.measure(name)
        runs.measure(TWO)
    both = {name: runs.speeds[name] for name in (LOCAL, RAY)}
    starts = {name: runs.starts[name] for name in (LOCAL, RAY)}
    workers = {name: runs.speeds[name][-1:] for name in (RAY, TWO)}
    return [
        Comparison(f"Steady state: {title}", "images per second", both, LOCAL, "at least 0.97"),
        Comparison("Start, from the command to the first step", "seconds", starts),
        Comparison(
            f"Two workers, {BATCH} images each, one thread each", "images per second", workers, RAY
        ),
    ]


def checkpoint(scale: Scale) -> Comparison:
    """Seconds of a checkpoint: on the training path, and beside it."""
    parameters = SMOKE_PARAMETERS if scale.smoke else PARAMETERS
    state = trained_state(parameters, scale.device)
    values: dict[str, list[float]] = {SYNC: [], WAITED: [], WRITTEN: []}
    with tempfile.TemporaryDirectory(prefix="d3etr-bench-") as folder:
        store = CheckpointStore(Path(folder), keep=1)
        saver = BackgroundSaver(store)
        for step in range(ROUNDS):
            values[SYNC].append(
                seconds(lambda step=step: store.save(2 * step, state), scale.device)
            )
            wait(scale.device)
            begun = time.perf_counter()
            saver.save(2 * step + 1, state)
            values[WAITED].append(time.perf_counter() - begun)
            saver.wait()
            values[WRITTEN].append(time.perf_counter() - begun)
        saver.close()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    title = f"A checkpoint of {parameters / 1e6:.1f} M parameters and AdamW's moments"
    return Comparison(title, "seconds", values, SYNC, notes=(f"{size:,} bytes.",))


def trained_state(parameters: int, device: torch.device) -> State:
    """Weights and two moments of each, in many tensors."""
    size = parameters // TENSORS
    return {
        kind: {str(n): torch.rand(size, device=device) for n in range(TENSORS)}
        for kind in ("model", "first moments", "second moments")
    }
