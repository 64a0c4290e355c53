"""Journal records as MLflow metrics, with as many digits as a person reads.

The journal (``RUN_DIR/journal.jsonl``) is the source of truth and keeps every digit.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]
RESULTS = {"parameters": "model/parameters"} | {
    name: f"final/{name}"
    for name in (
        "mAP",
        "AP50",
        "images_per_second",
        "training_seconds",
        "training_cpu_seconds",
        "training_device_seconds",
    )
}
"""Results of the weights that were kept, in a run's last record -> name in MLflow."""
DIGITS = 4
"""Significant digits of a metric; whole numbers keep all of theirs."""
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


def metric_points(record: Record) -> list[Point]:
    """Metrics of one record; values that are not finite are left out.

    Of a run's last record only what no other record has: the test split's metrics, and
    ``RESULTS``, those of the weights that were kept.
    """
    step, time = int(record.get("step", 0)), float(record.get("time", 0.0))
    metrics: Mapping[str, Any] = record.get("metrics", {})
    if record.get("kind") == "end":
        metrics = {
            RESULTS.get(key, key): value
            for key, value in metrics.items()
            if key in RESULTS or key.startswith("test/")
        }
    return [
        Point(metric_name(key), readable(value), step, time)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def readable(value: float) -> float:
    """``value`` with four significant digits: 0.43217894 is 0.4322; whole numbers as they are."""
    number = float(value)
    return number if number.is_integer() else float(f"{number:.{DIGITS}g}")


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
