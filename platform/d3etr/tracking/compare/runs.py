"""Finished runs read back from their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3etr.config.load import config_digest, load_config
from d3etr.config.tree import Config
from d3etr.engine.find_run import with_prefix
from d3etr.engine.journal import read_journal
from d3etr.engine.provenance import INPUTS_KEY
from d3etr.engine.run_folder import CONFIG_FILE, RunFolder
from d3etr.errors import UserError
from d3etr.files import read_json
from d3etr.logs import get_logger
from d3etr.tracking.description import chosen_keys, params, title

logger = get_logger(__name__)

UNCOMPARED = ("run.", "cluster.", "tracking.", "data.workers", "student.pretraining.")
"""Where and how a run happened, or a backbone before it: not what the run is."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds of a run.

    Attributes:
        folder: the run folder.
        config: its resolved configuration.
        summary: final metrics; mAP and AP as fractions.
        curve: optimiser step -> validation mAP of each evaluation.
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    curve: dict[int, float]

    @property
    def title(self) -> str:
        """Teacher, plain student, D3ETR student."""
        return title(self.config)

    def number(self, key: str) -> float | None:
        """A number of the summary, None where it has none."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) else None

    def content(self) -> dict[str, object]:
        """SHA-256 of the data that it read, by what error texts call it."""
        read = self.summary.get(INPUTS_KEY)
        data = read if isinstance(read, dict) else {}
        return {name: digest for name, digest in data.items() if name.startswith("the ")}

    def recipe(self) -> str:
        """Equal for runs that differ in their seed only."""
        section = self.config.run.model_copy(update={"seed": 0})
        return config_digest(self.config.model_copy(update={"run": section}))

    def settings(self) -> dict[str, str]:
        """Everything that makes the run what it is, with dotted keys."""
        flat = params(self.config)
        return {key: flat[key] for key in flat if not key.startswith(UNCOMPARED)}

    def chosen(self) -> set[str]:
        """Keys of ``settings`` that are not at their defaults."""
        return chosen_keys(self.config)


def read_run(path: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: it is none, or the run has not finished.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"{path} is not a run folder: it has no {CONFIG_FILE}")
    try:
        summary = read_json(folder.summary)
    except FileNotFoundError:
        raise UserError(
            f"{path} has not finished (last step {_last_step(path)}), so there is nothing to "
            f"compare yet; go on with it: d3etr train --resume {path.name}"
        ) from None
    curve = {
        int(record["step"]): float(record["metrics"]["val/mAP"])
        for record in read_journal(folder.journal)
        if record["kind"] == "evaluation" and "val/mAP" in record["metrics"]
    }
    return FinishedRun(path, load_config(folder.config), summary, curve)


def find_folders(run: str | Path, output_root: Path) -> list[Path]:
    """Folders of the runs that are meant.

    Args:
        run: a folder, the name of one in ``output_root``, a run's name or the beginning of one (all
            that fit and did a step are meant).
        output_root: the folder that holds runs.

    Raises:
        UserError: nothing fits.
    """
    if Path(run).is_dir():
        return [Path(run)]
    known = [path.parent for path in sorted(output_root.glob(f"*/{CONFIG_FILE}"))]
    fitting = with_prefix(str(run), known)
    if begun := [folder for folder in fitting if _last_step(folder) > 0]:
        for folder in fitting:
            if folder not in begun:
                logger.warning("%s is left out: it ended before its first step", folder)
        return begun
    if not fitting:
        listed = ", ".join(folder.name for folder in known[:10]) or "none"
        raise UserError(
            f"no run '{run}': neither a folder nor one of those in {output_root}: {listed}"
        )
    return fitting


def _last_step(folder: Path) -> int:
    journal = read_journal(RunFolder(folder).journal)
    return max((int(record["step"]) for record in journal), default=0)
