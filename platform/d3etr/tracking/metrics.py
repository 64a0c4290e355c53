"""Journal records as MLflow metrics.

The journal (``RUN_DIR/journal.jsonl``) is the source of truth. After a crash training goes
back to a checkpoint and the journal is cut back with it, so a record may come twice; a
metric is new when its step is beyond the last step MLflow has of the same name.
"""

from __future__ import annotations

import hashlib
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
_FORBIDDEN = re.compile(r"[^\w.\- ]|^ +| +$")
_ANY = re.compile(r".")
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
    """``key`` in MLflow's alphabet; two keys never get the same name.

    A character that MLflow does not take, a slash in a class's name and the colon itself become
    their code point: ``a/b`` is ``a:2f:b``, nothing at all is ``::``. Where that is too long, a
    digest of the key stands for its end.
    """
    for prefix in _CLASS_PREFIXES:
        if key.startswith(prefix):
            # A class called "and/or" must not become a folder of its own.
            name = prefix + _legal(key.removeprefix(prefix))
            break
    else:
        name = "/".join(map(_legal, key.split("/")))
    if len(name) <= _LONGEST_NAME:
        return name
    digest = f":{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:16]}"
    return name[: _LONGEST_NAME - len(digest)] + digest


def _legal(part: str) -> str:
    """One part of a name, which is neither empty nor a folder above, and keeps its blanks."""
    if not part:
        return "::"
    odd = _FORBIDDEN if part.strip(".") else _ANY
    return odd.sub(lambda found: "".join(f":{ord(one):x}:" for one in found[0]), part)
