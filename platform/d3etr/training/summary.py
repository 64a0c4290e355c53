"""What a finished run says of itself: ``summary.json`` beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from d3etr.logs import get_logger
from d3etr.training.storage import DamagedFileError, read_json, write_text

logger = get_logger(__name__)

SUMMARY_FILE, WEIGHTS_FILE = "summary.json", "weights.safetensors"
WEIGHTS_KEY = "weights"
"""Where a summary keeps the bytes of the weights file."""


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Say that the run is finished; its weights must be there.

    Raises:
        UserError: no space left, or not allowed.
    """
    size = (run_dir / WEIGHTS_FILE).stat().st_size
    content = {**summary, WEIGHTS_KEY: {"bytes": size}}
    write_text(run_dir / SUMMARY_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_summary(run_dir: Path | None) -> dict[str, Any] | None:
    """The summary of a finished run, None of any other.

    Where the summary or the weights are damaged, a warning names the file: such a run counts as
    one that is not finished, so that it is resumed from its newest checkpoint.
    """
    if run_dir is None or not (run_dir / WEIGHTS_FILE).exists():
        return None
    try:
        summary = read_json(run_dir / SUMMARY_FILE)
        _ensure_whole_weights(run_dir, summary)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        logger.warning("%s; the run counts as not finished", error)
        return None
    return summary


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary; whole ones stay whole."""
    return {name: value for name, value in summary.items() if is_number(value)}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ensure_whole_weights(run_dir: Path, summary: Mapping[str, Any]) -> None:
    noted = summary.get(WEIGHTS_KEY)
    if not isinstance(noted, dict):  # written before sizes were noted
        return
    found = (run_dir / WEIGHTS_FILE).stat().st_size
    if found != noted.get("bytes"):
        expected = f"{found} bytes, expected the {noted.get('bytes')} that {SUMMARY_FILE} notes"
        raise DamagedFileError(f"{run_dir / WEIGHTS_FILE} is damaged ({expected})")
