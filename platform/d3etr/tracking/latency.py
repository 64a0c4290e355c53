"""Latencies of a benchmark in MLflow, at the runs whose networks were measured."""

from __future__ import annotations

from pathlib import Path

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.text import bare_url
from d3etr.tracking.compare import Comparison
from d3etr.tracking.model_card import LATENCY, MACHINE
from d3etr.tracking.server import connect, first_line, patience, tracking_uri
from d3etr.tracking.state import read_state


def track_latencies(comparison: Comparison) -> list[str]:
    """Give each run its network's latency; runs of one network have one value.

    Args:
        comparison: with latencies.

    Returns:
        A sentence for each run that MLflow does not have.

    Raises:
        UserError: there are no latencies, or MLflow does not answer or refuses.
    """
    latencies, missing = comparison.latencies, list[str]()
    if latencies is None:
        raise UserError("--track sends latencies to MLflow: give them by --latency FILE")
    for group in comparison.groups:
        if (milliseconds := comparison.latency(group)) is None:
            continue
        for run in group.runs:
            machine = f"{latencies.machine}, {latencies.batch} at once"
            if not _send(run.config, run.folder, milliseconds, machine):
                missing.append(f"{run.folder} has no run in MLflow, which therefore lacks latency")
    return missing


def _send(config: Config, folder: Path, milliseconds: float, machine: str) -> bool:
    """Whether the folder has a run where its configuration tracks."""
    uri, state = tracking_uri(config), read_state(folder)
    if state is None or state.tracking_uri != bare_url(uri):
        return False
    client = connect(uri)
    try:
        with patience():
            client.log_metric(state.run_id, LATENCY, milliseconds)
            client.set_tag(state.run_id, MACHINE, machine)
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        raise UserError(
            f"MLflow at {bare_url(uri)} refuses the latency of {folder}: {first_line(error)}"
        ) from error
    return True
