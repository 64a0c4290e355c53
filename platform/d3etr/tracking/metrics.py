"""Journal records as MLflow metrics.

The journal (``RUN_DIR/journal.jsonl``) is the source of truth. After a crash training goes
back to a checkpoint and the journal is cut back with it, so a record may come twice; a
metric is new when its step is beyond the last step MLflow has of the same name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
RESULTS = (
    "mAP",
    "AP50",
    "parameters",
    "images_per_second",
    "training_seconds",
    "training_cpu_seconds",
    "training_device_seconds",
)
"""What a run's last record says about the weights that were kept."""
_LONGEST_NAME = 250
_FORBIDDEN = re.compile(r"[^\w.\- :]")
_CLASS_PREFIXES = ("val/AP/", "test/AP/", "teacher/AP/")


class Point(NamedTuple):
    """One value of one metric; ``time`` is in seconds since 1970."""

    key: str
    value: float
    step: int
    time: float


class Marks:
    """The last step that MLflow has of each metric."""

    def __init__(self, steps: Mapping[str, int] | None = None) -> None:
        self._steps = dict(steps or {})

    def is_new(self, point: Point) -> bool:
        """Whether the point is beyond what MLflow has."""
        return point.step > self._steps.get(point.key, -1)

    def add(self, points: list[Point]) -> None:
        """MLflow has these."""
        for point in points:
            self._steps[point.key] = max(point.step, self._steps.get(point.key, -1))

    @property
    def last_step(self) -> int:
        """Last step of any metric; -1 before the first."""
        return max(self._steps.values(), default=-1)


def metric_points(record: Record) -> list[Point]:
    """Metrics of one record; values that are not finite are left out.

    Of a run's last record only what no other record says: the test split's metrics, and below
    ``final/`` those of the weights that were kept.
    """
    step, time = int(record.get("step", 0)), float(record.get("time", 0.0))
    metrics = record.get("metrics", {})
    if record.get("kind") == "end":
        metrics = {_final_name(key): metrics[key] for key in metrics if _is_result(key)}
    return [
        Point(metric_name(key), float(value), step, time)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _is_result(key: str) -> bool:
    return key in RESULTS or key.startswith("test/")


def _final_name(key: str) -> str:
    return f"final/{key}" if key in RESULTS else key


def metric_name(key: str) -> str:
    """``key`` in MLflow's alphabet."""
    for prefix in _CLASS_PREFIXES:
        if key.startswith(prefix):
            # A class called "and/or" must not become a folder of its own.
            return prefix + _legal(key.removeprefix(prefix).replace("/", "_"))
    return "/".join(_legal(part) for part in key.split("/"))[:_LONGEST_NAME]


def _legal(part: str) -> str:
    legal = _FORBIDDEN.sub("_", part)[: _LONGEST_NAME // 2]
    return legal if legal.strip(".") else "_"
