"""What the demonstration found, and what to type next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from rich.console import Group

from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.demo.runs import DemoRun
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.tracking.address import how_to_open, runs_page
from d3etr.tracking.compare import compare
from d3etr.tracking.compare.tables import equal_time_table, results_table
from d3etr.tracking.state import read_state

logger = get_logger(__name__)

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
HEADINGS = ("mAP", "gain", "AP50", "parameters", "training")
"""What of a comparison fits on any terminal."""


def comparison_tables(runs: list[DemoRun]) -> Group:
    """The runs side by side, at equal steps and at equal time; accuracy in percent."""
    comparison = compare([run.result.run_dir for run in runs], Path())
    tables = [results_table(comparison, HEADINGS), equal_time_table(comparison)]
    return Group(*(table.as_rich() for table in tables if table.rows))


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
    # mlflow takes a second to import: only who has tracked pays.
    from d3etr.tracking.charts import charted_page
    from d3etr.tracking.server import connect, tracking_uri

    experiment = states[0].experiment_id
    try:
        client = connect(tracking_uri(runs[-1].config))
        page = charted_page(client, experiment, search, order_by, ascending=True)
    except UserError as error:
        logger.warning("%s", error)
        page = runs_page(experiment, search, order_by, ascending=True)
    lines = how_to_open(states[0].tracking_uri, page, python)
    return ["See the runs side by side in MLflow:", *(f"  {line}" for line in lines)]


def _a_picture(run: DemoRun) -> str:
    scenes = run.config.data.digit_scenes
    assert scenes is not None
    images = write_digit_scenes(scenes)["test"].images
    assert isinstance(images, Path)
    return _shown_path(min(images.iterdir()))


def _shown_path(path: Path) -> str:
    """Relative where that is shorter; quoted for the shell where it has to be."""
    absolute, relative = os.path.abspath(path), os.path.relpath(path)
    return shlex.quote(min(relative, absolute, key=len))
