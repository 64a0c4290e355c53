"""Views of MLflow's pages that read well: which runs, which columns, which charts, what order.

MLflow keeps a shared view as JSON in a tag of its experiment; a page's address names the tag.
A page without one shows the same runs: a view only chooses where a person begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.tracking.address import TRAINING_MENU
from d3etr.tracking.server import connect, patience, tracking_uri
from d3etr.tracking.state import RunState

logger = get_logger(__name__)

TAG = "mlflow.sharedViewState."
LONGEST_TAG = 5000
"""Characters of an experiment's tag that MLflow accepts."""
MODEL_METRICS = "Model metrics"
"""MLflow's own name of the section of metrics without a prefix."""
RESULTS = "Results"
OTHER_SECTIONS = (
    "val",
    "val/AP",
    "test",
    "test/AP",
    "train",
    "train/detection",
    "train/auxiliary",
    "train/adaptive",
    "train/fixed",
    "matching",
    "model",
    "final",
    "teacher",
    "optimiser",
    "time",
    MODEL_METRICS,
)
"""Below the results, folded: one a prefix of the metrics' names."""
COLUMNS = {
    "metrics.`val/mAP`": 100,
    "metrics.`test/mAP`": 100,
    "metrics.`test/AP50`": 100,
    "metrics.`model/parameters`": 130,
    "metrics.`final/images_per_second`": 180,
    "params.`optimisation.steps`": 150,
    "tags.`backbone`": 130,
}
"""Of the table of runs, in order: widths in pixels."""
FIRST_COLUMNS = {"attributes.`Run Name`": 290, "runDateAndNestInfo": 130, "duration": 80}
"""Which MLflow's table always has, by the names it has for them itself."""
WIDTH = 160

View = Mapping[str, Any]


def comparison_view(runs: Sequence[str], last_step: int | None = None) -> View:
    """A few runs side by side, curves first.

    Args:
        runs: ids; they are listed in the order in which they began.
        last_step: where the curve of mAP ends: a teacher that was trained for longer would
            press its students' curves against the axis. None shows everything.
    """
    listed = ", ".join(f"'{run}'" for run in runs)
    charts = [
        _line("val/mAP", last_step),
        _bar("test/mAP"),
        _bar("model/parameters"),
        _bar("final/images_per_second"),
        _line("train/loss"),
    ]
    order = {"orderByKey": "attributes.start_time", "orderByAsc": True}
    return _view(f"attributes.run_id IN ({listed})", charts, COLUMNS) | order


def sweep_view(parent: str, keys: Sequence[str]) -> View:
    """A sweep's trials, best first, with parallel coordinates of what varies.

    Args:
        parent: id of the sweep's run.
        keys: dotted keys that the sweep varies; none for named cases.
    """
    charts = [_bar("val/mAP"), _bar("test/mAP"), _line("val/mAP")]
    if keys:
        settings = {"selectedParams": list(keys), "selectedMetrics": ["val/mAP"]}
        charts.insert(0, _chart("PARALLEL", "val/mAP", **settings, showAllRuns=True))
    columns = COLUMNS | {f"params.`{key}`": WIDTH for key in keys}
    order = {"orderByKey": "metrics.`val/mAP`", "orderByAsc": False}
    return _view(f"tags.`mlflow.parentRunId` = '{parent}'", charts, columns) | order


def share(client: MlflowClient, experiment: str, view: View) -> str:
    """Keep a view in its experiment.

    Returns:
        Where it is on the server: the part of the address that begins with ``#``.

    Raises:
        MlflowException: MLflow refuses.
    """
    text = json.dumps(view, separators=(",", ":"))
    page = f"#/experiments/{experiment}/runs?{TRAINING_MENU}&compareRunsMode=CHART"
    if len(text) > LONGEST_TAG:  # a selection of very many runs: at least it is the selection
        return f"{page}&searchFilter={quote(view['searchFilter'])}"
    key = "d3etr-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    with patience():
        client.set_experiment_tag(experiment, TAG + key, text)
    return f"{page}&viewStateShareKey={key}"


def comparison_page(config: Config, runs: Sequence[RunState], last_step: int | None = None) -> str:
    """Where some runs of one experiment are side by side: what follows the server's address.

    It is MLflow's own page where MLflow cannot keep a view.

    Args:
        config: of one of the runs; has MLflow's address.
        runs: at least one.
        last_step: see ``comparison_view``.
    """
    ids, experiment = [run.run_id for run in runs], runs[0].experiment_id
    try:
        client = connect(tracking_uri(config))
        return share(client, experiment, comparison_view(ids, last_step))
    except (UserError, MlflowException) as error:
        logger.warning("MLflow shows the runs without their charts: %s", error)
        listed, experiments = (quote(json.dumps(names)) for names in (ids, [experiment]))
        return f"#/compare-runs?runs={listed}&experiments={experiments}"


def _view(searched: str, charts: Sequence[View], columns: Mapping[str, int]) -> dict[str, Any]:
    sections = [_section(RESULTS) | {"display": True}, *map(_section, OTHER_SECTIONS)]
    return {
        "searchFilter": searched,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": ["attributes.`Duration`", *columns],
        "columnOrder": [*FIRST_COLUMNS, *columns],
        "columnWidths": FIRST_COLUMNS | dict(columns),
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": list(charts),
        "compareRunSections": sections,
        # Else MLflow would sort the sections by name.
        "isAccordionReordered": True,
    }


def _section(name: str) -> dict[str, Any]:
    return {"uuid": f"d3etr-{name}", "name": name, "display": False, "isReordered": False}


def _chart(kind: str, name: str, **settings: Any) -> View:
    return {
        "type": kind,
        "uuid": f"d3etr-{kind}-{name}",
        "metricSectionId": f"d3etr-{RESULTS}",
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        **settings,
    }


def _line(metric: str, last_step: int | None = None) -> View:
    return _chart(
        "LINE",
        metric,
        metricKey=metric,
        selectedMetricKeys=[metric],
        lineSmoothness=0,
        xAxisKey="step",
        xAxisScaleType="linear",
        yAxisKey="metric",
        yAxisExpressions=[],
        scaleType="linear",
        range={} if last_step is None else {"xMin": 0, "xMax": 1.03 * last_step},
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _bar(metric: str) -> View:
    return _chart("BAR", metric, metricKey=metric)
