"""A verdict in MLflow: one run with its answer, its numbers and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from mlflow.entities import Metric

from d3etr.config.tree import Config
from d3etr.tracking.address import how_to_open, run_page
from d3etr.tracking.open_run import OpenRun
from d3etr.tracking.sender import ONCE, metric_name, readable

TAGS = {
    "role": "verdict",
    "mlflow.source.name": "d3etr verdict",
    "mlflow.source.type": "LOCAL",
}


def track_verdict(
    config: Config,
    folder: Path,
    sentence: str,
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    files: Sequence[Path],
) -> list[str]:
    """Send a verdict to MLflow.

    Args:
        config: has MLflow's address.
        folder: of the verdict, which remembers its MLflow run.
        sentence: the answer.
        params: what was asked.
        metrics: what was found, by name.
        files: artifacts.

    Returns:
        What a person types and opens to see it, or a sentence about what MLflow lacks.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    run = OpenRun(config, folder, f"verdict · {folder.name}", TAGS.copy, params)
    with run.refusals():
        run.client.set_tag(run.run_id, "mlflow.note.content", sentence)
        now = run.client.get_run(run.run_id).info.start_time
        logged = [
            Metric(metric_name(key), readable(value), now, ONCE) for key, value in metrics.items()
        ]
        run.client.log_batch(run.run_id, metrics=logged)
    steps = {file.name: partial(run.client.log_artifact, run.run_id, str(file)) for file in files}
    lacks = run.close("FINISHED", lambda: steps)
    if lacks is not None:
        return [f"MLflow at {run.place} lacks of the verdict: {lacks}. All is kept in {folder}"]
    return how_to_open(run.uri, run_page(run.state.experiment_id, run.run_id))
