"""What the demonstration found, and what to type next."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.demo.runs import DemoRun
from d3etr.tracking.state import read_state

PORT = 5000
"""MLflow's own default."""


def comparison_table(runs: list[DemoRun]) -> Table:
    """The three runs side by side; accuracy on the test split, in percent."""
    teacher, plain, distilled = runs
    steps = f"{plain.result.metrics['steps']:.0f}"
    table = Table(title=f"Digit scenes, test split, students after {steps} steps")
    table.add_column("run")
    for name in ("mAP", "AP50", "gain", "parameters", "images/s", "training"):
        table.add_column(name, justify="right")
    for run in (teacher, plain, distilled):
        table.add_row(*_row(run, plain if run is distilled else None))
    return table


def as_json(runs: list[DemoRun]) -> list[dict[str, Any]]:
    """The three runs as plain values; accuracy as fractions."""
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
    distilled = runs[-1]
    picture = _a_picture(distilled)
    weights = _shown_path(distilled.result.weights)
    parts = [
        *_mlflow_commands(runs, python),
        "Detect digits on a picture, drawn into predictions/:",
        f"  {python} -m d3etr predict {weights} {picture} --output predictions",
        "Compare the runs here:",
        f"  {python} -m d3etr compare {' '.join(_shown_path(r.result.run_dir) for r in runs)}",
    ]
    return "\n".join(parts)


def _row(run: DemoRun, baseline: DemoRun | None) -> list[str]:
    metrics = run.result.metrics
    seconds = metrics.get("training_seconds")
    return [
        run.title,
        _percent(run.metric("mAP")),
        _percent(run.metric("AP50")),
        _gain(run, baseline),
        f"{metrics['parameters'] / 1e6:.2f} M",
        f"{metrics['images_per_second']:.0f}",
        "shipped" if seconds is None else f"{seconds:.0f} s",
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _gain(run: DemoRun, baseline: DemoRun | None) -> str:
    ours, theirs = run.metric("mAP"), None if baseline is None else baseline.metric("mAP")
    return "" if ours is None or theirs is None else f"{100 * (ours - theirs):+.1f}"


def _mlflow_commands(runs: list[DemoRun], python: str) -> list[str]:
    states = [state for run in runs if (state := read_state(run.result.run_dir)) is not None]
    if not states:
        return []
    uri = states[0].tracking_uri
    ids = [state.run_id for state in states]
    experiments = sorted({state.experiment_id for state in states})
    query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"
    page = f"#/compare-runs?{query}"
    if uri.startswith(("http://", "https://")):
        return ["See the runs side by side in MLflow:", f"  {uri.rstrip('/')}/{page}"]
    return [
        "See the runs side by side in MLflow: start it, then open the address",
        f"  {python} -m mlflow ui --backend-store-uri {uri} --port {PORT}",
        f"  http://127.0.0.1:{PORT}/{page}",
    ]


def _a_picture(run: DemoRun) -> str:
    scenes = run.config.data.digit_scenes
    assert scenes is not None
    return _shown_path(min(write_digit_scenes(scenes)["test"].images.iterdir()))


def _shown_path(path: Path) -> str:
    """Relative where that is shorter; quoted for the shell where it has to be."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    chosen = relative if len(relative) < len(absolute) else absolute
    return f"'{chosen}'" if " " in chosen else chosen
