"""What the demonstration found, and what to type next."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.demo.runs import DemoRun
from d3etr.tracking.address import how_to_open, runs_page
from d3etr.tracking.compare import compare
from d3etr.tracking.compare.equal_time import CLOCKS, at_equal_time, clock_of
from d3etr.tracking.compare.tables import RESULT_HEADINGS, duration, result_cells
from d3etr.tracking.state import read_state

OWN_DATA = """\
The same on data of your own (COCO format; put your paths into the first two lines):
  TRAIN="data.train={{images: photos/train, annotations: photos/train.json}}"
  VALIDATION="data.validation={{images: photos/val, annotations: photos/val.json}}"
  {d3etr} check-data --set "$TRAIN" --set "$VALIDATION"
  {d3etr} train own/teacher --set "$TRAIN" --set "$VALIDATION"
  {d3etr} train own/plain --set "$TRAIN" --set "$VALIDATION"
  TEACHER="$(ls -t runs/own-teacher-*/weights.safetensors | head -n 1)"
  {d3etr} train own/inherited --set "$TRAIN" \\
    --set "$VALIDATION" --set student.initialise_from.weights="$TEACHER"
  {d3etr} train own/d3etr --set "$TRAIN" --set "$VALIDATION" \\
    --set teacher.weights="$TEACHER\""""
HEADINGS = ("mAP", "gain", "AP50", "parameters", "images/s", "training")
"""What of a comparison fits on any terminal."""


def comparison_table(runs: list[DemoRun]) -> Table:
    """The runs side by side; accuracy on the test split, in percent."""
    comparison = compare([run.result.run_dir for run in runs], Path())
    title = f"Digit scenes, {comparison.split} split, %"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("run", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for run, group in zip(runs, comparison.groups, strict=True):
        cells = dict(zip(RESULT_HEADINGS, result_cells(comparison, group), strict=True))
        table.add_row(run.title, *(cells[heading] for heading in HEADINGS))
    return table


def equal_time(runs: list[DemoRun]) -> str:
    """What the D3ETR student gains over the strongest plain one within the same time."""
    comparison = compare([run.result.run_dir for run in runs], Path())
    clock = clock_of([group for group in comparison.groups if group.title != "teacher"])
    titles = {group.label: run.title for run, group in zip(runs, comparison.groups, strict=True)}
    return "\n".join(
        f"At equal time ({duration(row.seconds[0])} and {duration(row.seconds[1])}, "
        f"{CLOCKS[clock or 'training_seconds']}): "
        f"{titles[row.group.label]} {100 * row.mAP[0]:.1f} mAP, {titles[row.rival.label]} "
        f"{100 * row.mAP[1]:.1f}, a difference of {100 * (row.mAP[0] - row.mAP[1]):+.1f}"
        for row in at_equal_time(comparison)
        if not row.estimated
    )


def as_json(runs: list[DemoRun]) -> list[dict[str, Any]]:
    """The runs as plain values; accuracy as fractions."""
    return [
        {
            "title": run.title,
            "run_dir": str(run.result.run_dir),
            "weights": str(run.result.weights),
            "mlflow_run": run.result.tracked_run,
            "metrics": run.result.metrics,
        }
        for run in runs
    ]


def next_steps(runs: list[DemoRun]) -> str:
    """Commands that can be pasted: the comparison in MLflow, a picture, own data."""
    python = _shown_path(Path(sys.executable))
    d3etr, weights = f"{python} -m d3etr", _shown_path(runs[-1].result.weights)
    folders = " ".join(_shown_path(run.result.run_dir) for run in runs)
    parts = [
        *_mlflow_commands(runs, python),
        "Detect digits on a picture, drawn into predictions/:",
        f"  {d3etr} predict {weights} {_a_picture(runs[-1])} --output predictions",
        "Compare the runs here; the page adds curves and what each detects on the same images:",
        f"  {d3etr} compare {folders} --html comparison.html",
        OWN_DATA.format(d3etr=d3etr),
    ]
    return "\n".join(parts)


def _mlflow_commands(runs: list[DemoRun], python: str) -> list[str]:
    folders = [run.result.run_dir for run in runs if run.result.tracked_run is not None]
    states = [state for folder in folders if (state := read_state(folder)) is not None]
    if not states:
        return []
    listed = ", ".join(f"'{state.run_id}'" for state in states)
    search, order_by = f"attributes.run_id IN ({listed})", "attributes.start_time"
    page = runs_page(states[0].experiment_id, search, order_by, ascending=True)
    lines = how_to_open(states[0].tracking_uri, page, python)
    title = "See the runs side by side in MLflow:"
    if len(lines) > 1:
        title = "See the runs side by side in MLflow: start it, then open the address"
    return [title, *(f"  {line}" for line in lines)]


def _a_picture(run: DemoRun) -> str:
    scenes = run.config.data.digit_scenes
    assert scenes is not None
    images = write_digit_scenes(scenes)["test"].images
    assert isinstance(images, Path)
    return _shown_path(min(images.iterdir()))


def _shown_path(path: Path) -> str:
    """Relative where that is shorter; quoted for the shell where it has to be."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    chosen = relative if len(relative) < len(absolute) else absolute
    return f"'{chosen}'" if " " in chosen else chosen
