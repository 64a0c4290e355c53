"""What a run begins with, by content: results belong to these files and to no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from d3etr.config.tree import Config
from d3etr.detectors.weights import file_digest
from d3etr.errors import UserError

SUMMARY_KEY = "inputs"
"""Where a run's summary keeps them."""


def weight_digests(config: Config) -> dict[str, str]:
    """SHA-256 of the weights files that a run begins with and that are there, by key."""
    start = config.student.initialise_from
    files = {
        "student.backbone_weights": config.student.backbone_weights,
        "student.initialise_from.weights": None if start is None else start.weights,
        "teacher.weights": None if config.teacher is None else config.teacher.weights,
    }
    return {
        key: file_digest(file)
        for key, file in files.items()
        if isinstance(file, Path) and file.is_file()
    }


def ensure_same_inputs(before: Mapping[str, str], now: Mapping[str, str], run_dir: Path) -> None:
    """Refuse to go on with a run, or to take its result, with other files.

    Args:
        before: digests that the run began with, by name.
        now: those of today.
        run_dir: the run's folder.

    Raises:
        UserError: naming what changed.
    """
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        verb = "is" if len(changed) == 1 else "are"
        raise UserError(
            f"{' and '.join(changed)} {verb} not what the run in {run_dir} began with: its "
            "results would belong to neither. Put the old files back, or give the run another "
            "name (run.name) to start anew"
        )


def ensure_result_is_of(config: Config, summary: Path) -> None:
    """Refuse a finished run's result when a weights file that it began with has changed since.

    A file that is gone says nothing: results outlive the teachers.

    Args:
        config: what is asked for now.
        summary: the finished run's ``summary.json``.

    Raises:
        UserError: naming what changed.
    """
    recorded = json.loads(summary.read_text(encoding="utf-8")).get(SUMMARY_KEY, {})
    now = {key: value for key, value in weight_digests(config).items() if key in recorded}
    ensure_same_inputs({key: recorded[key] for key in now}, now, summary.parent)
