"""What runs inside a Ray Tune trial: the same training as everywhere else."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from d3etr.config.tree import Config
from d3etr.engine.checkpoints import CheckpointStore
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import Record, read_journal
from d3etr.engine.run_folder import RunFolder, is_number
from d3etr.errors import UserError
from d3etr.files import atomic_write, link_or_copy, read_json, write_text
from d3etr.launch.driver import Launcher, RunResult, drive
from d3etr.launch.local import LocalLauncher
from d3etr.launch.lock import RunLock, RunLockedError
from d3etr.launch.progress_reporter import NullDisplay
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.trial_ids import number_in
from d3etr.launch.sweeps.trials import Trial

LOCK_SECONDS = 60.0
"""After a driver's death its trials go on for some seconds and hold their folders."""
ORIGIN_FILE = "origin.json"


def run_trial(parameters: dict[str, Any], plan: Plan, at_a_time: int) -> None:
    """Train one trial; called by Ray Tune.

    Args:
        parameters: the number of a planned trial, or the point that the search proposes.
        plan: the sweep.
        at_a_time: trials that the cluster has room for.

    Raises:
        Exception: whatever training raises; the same again on further attempts, without
            training, as only a lost process or node is worth another one.
    """
    trial_dir = tune.get_context().get_trial_dir()
    assert trial_dir is not None
    trial = plan.trial(parameters, number_in(trial_dir))
    reason = failure_reason(plan, trial.number)
    if reason is not None:
        raise RuntimeError(reason)
    try:
        final = _final(_result(plan, trial, at_a_time))
    except Exception as error:
        file = failure_file(plan, trial.number)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, str(error) or repr(error))
        raise
    tune.report(final)


def _result(plan: Plan, trial: Trial, at_a_time: int) -> Path:
    """Folder of the finished run: one that was there before, or the trial's own."""
    config = plan.config(trial)
    population = plan.sweep.search.method == "population"
    twin = None if population else plan.finished_twin(config)
    if twin is not None:
        return twin
    config, folder = _place(trial.number, config)
    reporter = TuneReporter(trial.number, folder, with_weights=population)
    if config.cluster.workers == 1:
        return _train(plan.placed(config), folder, reporter).run_dir
    with limited(plan.folder / "turns", at_a_time):
        return _train(plan.placed(config), folder, reporter).run_dir


@contextmanager
def limited(folder: Path, at_a_time: int) -> Iterator[None]:
    """Wait until fewer than ``at_a_time`` others are in the block.

    To Ray, a trial whose workers are processes of their own needs no room. A sweep that is resumed
    starts all interrupted trials at once, on a cluster that may be smaller.
    """
    with ExitStack() as stack:
        while not any(_locked(stack, folder / str(number)) for number in range(at_a_time)):
            time.sleep(1.0)
        yield


def _locked(stack: ExitStack, place: Path) -> bool:
    place.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(RunLock(place))
    except RunLockedError:
        return False
    return True


def failure_file(plan: Plan, number: int) -> Path:
    """Where a trial writes why it cannot succeed."""
    return plan.folder / "failures" / f"{number:03d}.txt"


def failure_reason(plan: Plan, number: int) -> str | None:
    """Why a trial cannot succeed; None where nothing is known."""
    file = failure_file(plan, number)
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else None


@dataclass(frozen=True)
class TuneReporter:
    """Reports evaluations to Ray Tune.

    Attributes:
        number: of the trial.
        folder: of its run.
        with_weights: hand over the checkpoint too, for others to copy.
    """

    number: int
    folder: RunFolder
    with_weights: bool

    def __call__(self, metrics: dict[str, float]) -> None:
        """Report an epoch in which the student was evaluated; returns when Tune has it.

        The last epoch is left to ``run_trial``, which knows the run's result.
        """
        if "val/mAP" not in metrics or metrics["final"]:
            return
        report = {"mAP": metrics["val/mAP"], "epoch": int(metrics["epoch"])}
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = self._checkpoint(Path(scratch)) if self.with_weights else None
            place = {"run_dir": str(self.folder.path), "final": False}
            tune.report(report | place, checkpoint=checkpoint)

    def _checkpoint(self, scratch: Path) -> tune.Checkpoint:
        newest = CheckpointStore(self.folder.checkpoints, keep=1).newest()
        assert newest is not None, "the loop saves before it reports"
        for file in newest.folder.iterdir():
            link_or_copy(file, scratch / file.name)
        origin = {"trial": self.number, "run_dir": str(self.folder.path), "step": newest.step}
        write_text(scratch / ORIGIN_FILE, json.dumps(origin))
        return tune.Checkpoint.from_directory(scratch)


class TrialContext(SingleProcess):
    """A world of one that reports to Ray Tune."""

    def __init__(self, reporter: TuneReporter) -> None:
        super().__init__()
        self._reporter = reporter
        self.reads_checkpoints = reporter.with_weights

    def report(self, metrics: dict[str, float]) -> None:
        """Report an epoch to Tune, which may end the trial here."""
        self._reporter(metrics)


class JournalReporter(NullDisplay):
    """Reports from the journal, where the training is in processes of its own."""

    def __init__(self, reporter: Callable[[dict[str, float]], None]) -> None:
        self._reporter = reporter
        self._steps, self._per_epoch = 0, 1

    def consume(self, record: Record) -> None:
        """Pass an evaluation on, but for those within epochs: Tune counts in epochs."""
        if record["kind"] == "start":
            self._steps, self._per_epoch = record["steps"], record["steps_per_epoch"]
        if record["kind"] != "evaluation":
            return
        final = record["step"] >= self._steps
        if final or record["step"] % self._per_epoch == 0:
            self._reporter(record["metrics"] | {"final": final})


def _place(number: int, config: Config) -> tuple[Config, RunFolder]:
    """Where a trial trains: its folder, or a new one that starts from another trial's weights."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return config, folder_of(config)
    with checkpoint.as_directory() as given:
        origin = read_json(Path(given) / ORIGIN_FILE)
        if origin["trial"] == number:
            return config, RunFolder(Path(origin["run_dir"]))
        suffix = f"_from-{origin['trial']:03d}-at-{origin['step']}"
        run = config.run.model_copy(update={"name": config.run.name + suffix})
        heir = config.model_copy(update={"run": run})
        folder = folder_of(heir)
        _inherit(Path(given), folder.checkpoint(origin["step"]))
        return heir, folder


def _inherit(source: Path, target: Path) -> None:
    """Copy a checkpoint, unless it was done before; it appears only when it is complete."""
    if target.parent.exists() and any(target.parent.glob("step-*")):
        return
    with atomic_write(target) as temporary:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(ORIGIN_FILE))


def _train(config: Config, folder: RunFolder, reporter: TuneReporter) -> RunResult:
    if config.cluster.workers == 1:
        launcher: Launcher = LocalLauncher(context=lambda: TrialContext(reporter))
        display = NullDisplay()
    else:
        from d3etr.launch.ray_train import RayLauncher

        launcher, display = RayLauncher(), JournalReporter(reporter)
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return drive(config, folder, launcher, display=display, open_tracker=None)
        except RunLockedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(1.0)


def _final(run_dir: Path) -> dict[str, Any]:
    """The last report: what the finished run found, at the epoch that it reached."""
    summary = RunFolder(run_dir).read_summary()
    if summary is None or not is_number(summary.get("mAP")):
        raise UserError(
            f"{run_dir} has no validation mAP to compare trials by: does the validation split hold "
            "objects?"
        )
    return {
        "mAP": summary["mAP"],
        "epoch": _epochs(run_dir),
        "run_dir": str(run_dir),
        "final": True,
    }


def _epochs(run_dir: Path) -> int:
    """That the run reached: as it began, else (a damaged journal) as it was last evaluated."""
    journal = read_journal(RunFolder(run_dir).journal)
    for record in journal:
        if record["kind"] == "start" and record.get("steps_per_epoch"):
            return int(-(-record["steps"] // record["steps_per_epoch"]))
    evaluated = (record["metrics"] for record in journal if record["kind"] == "evaluation")
    return max((int(metrics.get("epoch", 1)) for metrics in evaluated), default=1)
