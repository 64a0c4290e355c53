"""A run's folder: the one place that names the files in it.

It is called NAME-DIGEST, with a digest of the configuration (see ``find_run``), and holds the
resolved configuration, the journal that rank 0 writes, checkpoints, and, once the run is
finished, the student's weights and a summary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from d3etr.config.load import load_config
from d3etr.config.problems import ConfigError
from d3etr.config.tree import Config
from d3etr.files import DamagedFileError, read_json, write_text
from d3etr.logs import get_logger

logger = get_logger(__name__)

CONFIG_FILE, JOURNAL_FILE = "config.yaml", "journal.jsonl"
SUMMARY_FILE, WEIGHTS_FILE = "summary.json", "weights.safetensors"
CHECKPOINT_PREFIX = "step-"
WEIGHTS_KEY = "weights"
"""Where a summary keeps the bytes of the weights file."""


@dataclass
class RunFolder:
    """The paths in a run's folder, and the content of the small files among them.

    Attributes:
        config: the resolved configuration, with absolute paths.
        journal: written by rank 0.
        checkpoints: a folder of folders ``step-00000750``.
        summary: the final metrics; there once the run is finished.
        weights: the trained student.
        lock: names the process that writes to the folder; see ``d3etr.launch.lock``.
        ray: what Ray and our workers write while they train; a folder for each launch.
        mlflow_run: which MLflow run the folder belongs to, and what was sent to it.
        figures: pictures that were drawn for MLflow.
    """

    path: Path

    def __post_init__(self) -> None:
        self.config, self.journal = self.path / CONFIG_FILE, self.path / JOURNAL_FILE
        self.summary, self.weights = self.path / SUMMARY_FILE, self.path / WEIGHTS_FILE
        self.checkpoints, self.figures = self.path / "checkpoints", self.path / "figures"
        self.lock, self.ray = self.path / "lock", self.path / "ray"
        self.mlflow_run = self.path / "mlflow_run.json"

    def read_config(self) -> Config | None:
        """What the run was started with; None where there is no run.

        None also, with a warning, where the file is damaged.
        """
        if not self.config.exists():
            return None
        try:
            return load_config(self.config)
        except ConfigError as error:
            logger.warning("%s; its run is taken for the one that its name says", error)
            return None

    def result(self) -> dict[str, float] | None:
        """Final metrics of a finished run, None of any other; see ``read_summary``."""
        summary = self.read_summary()
        return None if summary is None else numbers(summary)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None of any other.

        Where the summary or the weights are damaged, a warning names the file: such a run counts
        as one that is not finished, so that it is resumed from its newest checkpoint.
        """
        if not self.weights.exists():
            return None
        try:
            size = self.weights.stat().st_size
            summary = read_json(self.summary)
            noted = summary.get(WEIGHTS_KEY)  # older summaries note no size
            if isinstance(noted, dict) and noted.get("bytes") != size:
                expected = f"{size} bytes, expected {noted.get('bytes')} as in {SUMMARY_FILE}"
                raise DamagedFileError(f"{self.weights} is damaged ({expected})")
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            logger.warning("%s; the run counts as not finished", error)
            return None
        return summary

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished; its weights must be there.

        Raises:
            UserError: no space left, or not allowed.
        """
        content = {**summary, WEIGHTS_KEY: {"bytes": self.weights.stat().st_size}}
        write_text(self.summary, json.dumps(content, indent=1, allow_nan=False) + "\n")


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary; whole ones stay whole."""
    return {name: value for name, value in summary.items() if is_number(value)}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
