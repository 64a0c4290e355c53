"""What trials reported before a sweep was interrupted, read from their journals.

Ray Tune keeps the newest report only, and nothing of a scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ray import tune

from d3etr.engine.journal import read_journal
from d3etr.engine.run_folder import RunFolder

Curve = list[tuple[int, float]]
"""Epochs and mAP."""


def curves(grid: Iterable[tune.Result]) -> dict[str, Curve]:
    """Ray Tune's id of every trial that has reported -> its curve."""
    reports = (result.metrics or {} for result in grid)
    return {
        report["trial_id"]: curve_of(Path(report["run_dir"]))
        for report in reports
        if "run_dir" in report
    }


def curve_of(run_dir: Path) -> Curve:
    """The evaluations of a run at the end of its epochs."""
    curve: Curve = []
    steps_per_epoch = 1
    for record in read_journal(RunFolder(run_dir).journal):
        if record["kind"] == "start":
            steps_per_epoch = record.get("steps_per_epoch") or steps_per_epoch
        elif record["kind"] != "evaluation" or "val/mAP" not in record["metrics"]:
            continue
        elif record["step"] % steps_per_epoch == 0:
            curve.append((record["step"] // steps_per_epoch, record["metrics"]["val/mAP"]))
    return curve
