"""Addresses of MLflow and of its pages, as they may be shown and stored."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import urlencode

from d3etr.engine.journal import KEPT_MAP
from d3etr.text import bare_url

PORT = 5000
"""MLflow's own default."""
BEST_FIRST = f"metrics.`{KEPT_MAP}`"
"""Column that runs are sorted by: a run is as good as the weights that it keeps, also before it
ends, and the last evaluation may be of others."""
TRAINING_MENU = {"workflowType": "machine_learning"}
"""Models are trained here: MLflow's menu is otherwise that of chats and agents."""


def embedded_uri(output: Path) -> str:
    """Address of the SQLite file next to the runs in ``output``."""
    # Not Path.resolve: who makes the folder says that its links go in a circle.
    return f"sqlite:///{os.path.realpath(output)}/mlflow.db"


def run_page(experiment: str, run: str) -> str:
    """Where a run is on MLflow's server: the part of the address that begins with ``#``."""
    return f"#/experiments/{experiment}/runs/{run}?{urlencode(TRAINING_MENU)}"


def runs_page(experiment: str, search: str, order_by: str, *, ascending: bool = False) -> str:
    """Where some runs of an experiment are side by side, with MLflow's charts.

    Args:
        experiment: its id.
        search: which runs, in MLflow's language of filters.
        order_by: the column that they are sorted by.
        ascending: smallest value first.
    """
    query = {
        "compareRunsMode": "CHART",
        "searchFilter": search,
        "orderByKey": order_by,
        "orderByAsc": str(ascending).lower(),
    }
    return f"#/experiments/{experiment}/runs?{urlencode(TRAINING_MENU | query)}"


def how_to_open(uri: str, page: str, python: str = "python") -> list[str]:
    """What a person types and opens to see a page of MLflow; nothing typed if a server runs.

    Args:
        uri: MLflow's address.
        page: the part of a page's address that begins with ``#``.
        python: how to call the interpreter.
    """
    place = bare_url(uri)
    if place.startswith(("http://", "https://")):
        return [f"{place.rstrip('/')}/{page}"]
    return [
        f"{python} -m mlflow ui --backend-store-uri {shlex.quote(place)} --port {PORT}",
        f"http://127.0.0.1:{PORT}/{page}",
    ]
