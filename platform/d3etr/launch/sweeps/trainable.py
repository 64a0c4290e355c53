"""What runs inside a Ray Tune trial: the same training as everywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import Record
from d3etr.engine.run_folder import RunFolder, is_number
from d3etr.errors import UserError
from d3etr.launch.display import Display
from d3etr.launch.driver import Launcher, drive
from d3etr.launch.lock import RunLockedError
from d3etr.launch.processes import local_launcher
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import reached_epoch

LOCK_SECONDS = 60.0
"""After a driver's death its trials go on for some seconds and hold their folders."""


def run_trial(parameters: dict[str, Any], plan: Plan) -> None:
    """Train one trial; called by Ray Tune.

    An exception is reported as the trial's end, under ``reason``: to Tune it would be a lost
    process, and it would try again what cannot succeed.

    Args:
        parameters: see ``Plan.trial``.
        plan: the sweep.
    """
    final: dict[str, Any] = {"mAP": math.nan, "epoch": 0, "final": True}
    try:
        config = plan.config(plan.trial(parameters))
        final["run_dir"] = str(folder_of(config).path)
        final |= _final(plan.finished_twin(config) or _train(plan.placed(config)))
    except Exception as error:
        final["reason"] = str(error) or repr(error)
    tune.report(final)


class TrialContext(SingleProcess):
    """A world of one that reports to Ray Tune."""

    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        super().__init__()
        self._report = report

    def report(self, metrics: dict[str, float]) -> None:
        """Report an epoch to Tune, which may end the trial here."""
        self._report(metrics)


class JournalReporter(Display):
    """Reports from the journal, where the training is in processes of its own."""

    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        self._report = report
        self._steps, self._per_epoch = 0, 1

    def consume(self, record: Record) -> None:
        """Pass an evaluation on, but for those within epochs: Tune counts in epochs."""
        if record["kind"] == "start":
            self._steps, self._per_epoch = record["steps"], record["steps_per_epoch"]
        if record["kind"] == "evaluation" and record["step"] % self._per_epoch == 0:
            self._report(record["metrics"] | {"final": record["step"] >= self._steps})


def _train(config: Config) -> Path:
    folder = folder_of(config)

    def report(metrics: dict[str, float]) -> None:
        """Report an evaluation; the last one is left to ``run_trial``, which knows the result."""
        if "val/mAP" in metrics and not metrics["final"]:
            seen = {"mAP": metrics["val/mAP"], "epoch": int(metrics["epoch"])}
            tune.report(seen | {"run_dir": str(folder.path), "final": False})

    if config.cluster.workers == 1:
        launcher: Launcher = local_launcher(context=lambda: TrialContext(report))
        display = Display()
    else:
        from d3etr.launch.ray_train import ray_launcher

        launcher, display = ray_launcher(), JournalReporter(report)
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return drive(config, folder, launcher, display=display, open_tracker=None).run_dir
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
    return {"mAP": summary["mAP"], "epoch": reached_epoch(run_dir), "run_dir": str(run_dir)}
