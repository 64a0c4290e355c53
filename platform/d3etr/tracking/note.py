"""The description of a run in MLflow, which is the first that its page shows: what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from d3etr.config.tree import Config
from d3etr.engine.journal import Record, read_journal
from d3etr.engine.run_folder import RunFolder, is_number
from d3etr.progress import duration
from d3etr.tracking.description import title

KEY = "mlflow.note.content"
_FOLDER = "Run folder `"


def opening_note(config: Config, run_dir: Path) -> str:
    """The description of a run that begins."""
    return _note(config, run_dir, [])


def tell_result(
    client: MlflowClient, run_id: str, config: Config, run_dir: Path, status: str, *, pruned: bool
) -> None:
    """Write the result into a run's description, unless a person has written another.

    Args:
        client: of MLflow.
        run_id: of the run.
        config: the run's configuration.
        run_dir: its folder, with the journal and, of a finished run, the summary.
        status: how it ended, in MLflow's words.
        pruned: a sweep stopped it early.
    """
    present = client.get_run(run_id).data.tags.get(KEY, "")
    if present and _FOLDER not in present:
        return
    folder = RunFolder(run_dir)
    summary = folder.read_summary()
    if summary is not None:
        lines = result_lines(summary)
    else:
        lines = [_where_it_ended(read_journal(folder.journal), status, pruned)]
    client.set_tag(run_id, KEY, _note(config, run_dir, lines))


def place_of(records: Sequence[Record]) -> str:
    """``step 300 of 750``: how far a journal goes."""
    step = max((int(record["step"]) for record in records), default=0)
    steps = next((r["steps"] for r in reversed(records) if r["kind"] == "start"), 0)
    return f"step {step:,} of {steps:,}" if steps else f"step {step:,}"


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """A finished run in two lines: accuracy, then size, length and speed, as far as known."""
    scores = []
    for split, prefix in (("validation", ""), ("test", "test/")):
        if is_number(mAP := summary.get(f"{prefix}mAP")):
            ap50 = summary.get(f"{prefix}AP50")
            more = f" (AP50 {100 * ap50:.1f})" if is_number(ap50) else ""
            scores.append(f"**{100 * mAP:.1f} mAP** on {split}{more}")
    costs = []
    if is_number(parameters := summary.get("parameters")):
        costs.append(f"{_short(parameters)} parameters")
    if is_number(steps := summary.get("steps")):
        costs.append(f"{int(steps):,} steps")
    if is_number(seconds := summary.get("training_seconds")):
        costs.append(f"{duration(seconds)} of training")
    if is_number(rate := summary.get("training_images_per_second")):
        costs.append(f"{rate:.3g} images/s")
    return [", ".join(part) for part in (scores, costs) if part]


def _where_it_ended(records: Sequence[Record], status: str, pruned: bool) -> str:
    ended = {"FAILED": "Failed at", "KILLED": "Stopped at"}.get(status, "Ended at")
    text = f"{'Stopped early by the sweep at' if pruned else ended} {place_of(records)}"
    measured = [
        (record["metrics"]["val/mAP"], record["step"])
        for record in records
        if record["kind"] == "evaluation" and "val/mAP" in record["metrics"]
    ]
    if not measured:
        return f"{text}, before the first evaluation."
    mAP, step = max(measured)
    return f"{text}; best until then **{100 * mAP:.1f} mAP** on validation, at step {step:,}."


def _note(config: Config, run_dir: Path, lines: Sequence[str]) -> str:
    start = f"**{title(config)}**, detector {config.student.detector.name}"
    return "\n\n".join([start, *lines, f"{_FOLDER}{run_dir.resolve()}`"])


def _short(count: float) -> str:
    """``1.2 M``, ``18.2 k``: a number of parameters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(int(count))
