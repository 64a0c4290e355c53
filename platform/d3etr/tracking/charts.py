"""Which of MLflow's charts a page of runs begins with: results, and not what comes first by name.

MLflow keeps a shared view as JSON in a tag of its experiment; a page's address names the tag.
A page without one shows the same runs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import urlencode

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.engine.journal import KEPT_MAP
from d3etr.logs import get_logger
from d3etr.tracking.address import TRAINING_MENU, runs_page
from d3etr.tracking.server import patience

logger = get_logger(__name__)

TAG = "mlflow.sharedViewState."
LONGEST_TAG = 5000
"""Characters of an experiment's tag that MLflow accepts."""
LINES, BARS = ("val/mAP", "train/loss"), ("test/mAP", "model/parameters")
OTHERS = ("figures", "val", "val/AP", "test", "train", "matching", "time", "Model metrics")
"""Sections of further charts below the results, folded."""


def charted_page(
    client: MlflowClient, experiment: str, search: str, order_by: str, *, ascending: bool = False
) -> str:
    """``runs_page`` whose charts are the results: mAP over steps and at the end, size.

    Args:
        client: of the server that keeps the view.
        experiment: the runs' id.
        search: which runs, in MLflow's language of filters.
        order_by: the column that they are sorted by.
        ascending: smallest value first.
    """
    page = runs_page(experiment, search, order_by, ascending=ascending)
    columns = [f"metrics.`{name}`" for name in (KEPT_MAP, *BARS)]
    view = {
        "searchFilter": search,
        "orderByKey": order_by,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "runsHiddenMode": "FIRST_20_RUNS",
        "selectedColumns": ["attributes.`Duration`", *columns],
        "compareRunCharts": [*map(_line, LINES), *map(_bar, BARS)],
        "compareRunSections": [_section("Results", True), *map(_section, OTHERS)],
        "isAccordionReordered": True,  # else MLflow sorts sections by name
    }
    text = json.dumps(view, separators=(",", ":"))
    if len(text) > LONGEST_TAG:  # very many runs
        return page
    key = "d3etr-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        with patience():
            client.set_experiment_tag(experiment, TAG + key, text)
    except MlflowException as error:
        logger.warning("MLflow shows the runs in its own order of charts: %s", error)
        return page
    query = urlencode(TRAINING_MENU | {"compareRunsMode": "CHART", "viewStateShareKey": key})
    return f"#/experiments/{experiment}/runs?{query}"


def _section(name: str, shown: bool = False) -> dict[str, Any]:
    return {"uuid": f"d3etr-{name}", "name": name, "display": shown, "isReordered": False}


def _chart(kind: str, metric: str, **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"d3etr-{kind}-{metric}",
        "metricSectionId": "d3etr-Results",
        "metricKey": metric,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        **settings,
    }


def _line(metric: str) -> dict[str, Any]:
    axes = {"xAxisKey": "step", "yAxisKey": "metric", "yAxisExpressions": [], "range": {}}
    scales = {"xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0}
    return _chart("LINE", metric, selectedMetricKeys=[metric], **axes, **scales)


def _bar(metric: str) -> dict[str, Any]:
    return _chart("BAR", metric)
