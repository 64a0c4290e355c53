"""Sends a journal's metrics to MLflow from a thread of its own: training never waits for it."""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d3etr.engine.journal import JournalReader
from d3etr.logs import get_logger
from d3etr.tracking.server import first_line, patience

logger = get_logger(__name__)

BATCH = 500
"""Points per request; MLflow takes at most 1000."""
POLL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LAST_PAUSES_SECONDS = (1.0, 3.0, 0.0)
"""After each attempt of a run that ends."""
RESULTS = {"parameters": "model/parameters"} | {
    name: f"final/{name}"
    for name in (
        "mAP",
        "AP50",
        "training_seconds",
        "training_cpu_seconds",
        "training_device_seconds",
    )
}
"""Results of the weights that were kept, in a run's last record -> name in MLflow."""
ONCE = 0
"""Step of what a run has once: MLflow draws bars of it, at any other step lines of one dot."""
DIGITS = 4
"""Significant digits of a metric; whole numbers keep all of theirs."""
_LONGEST_NAME = 250
_FORBIDDEN = re.compile(r"[^\w.\- ]|^ +| +$")
_ANY = re.compile(r".")
_CLASS_PREFIXES = ("val/AP/", "test/AP/", "teacher/AP/")


class Sender:
    """Follows a journal and sends what MLflow does not have yet.

    After a crash training goes back to a checkpoint and the journal is cut back with it, so a
    record may come twice; a metric is new when its step is beyond the last step that MLflow has
    of the same name. A request that failed may have been carried out all the same, so after a
    failure the server is asked what it has before anything is sent again.

    Args:
        client: of MLflow.
        run_id: the run.
        journal: the file, which need not exist yet.
        on_sent: takes the last step that MLflow has confirmed.

    Raises:
        Exception: whatever MLflow raises when asked what it has.
    """

    def __init__(
        self, client: MlflowClient, run_id: str, journal: Path, on_sent: Callable[[int], None]
    ) -> None:
        self._client, self._run_id, self._on_sent = client, run_id, on_sent
        self._reader = JournalReader(journal)
        self._last_steps: dict[str, int] | None = self._ask()
        self._waiting: list[Metric] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-sender", daemon=True)
        self._thread.start()

    def close(self) -> Exception | None:
        """Stop following and send the rest of the journal.

        Returns:
            What went wrong, None if MLflow has everything.
        """
        self._closing.set()
        self._thread.join()
        for pause in LAST_PAUSES_SECONDS:
            if (failure := self._attempt()) is None:
                return None
            time.sleep(pause)
        return failure

    def _follow(self) -> None:
        pause = POLL_SECONDS
        while not self._closing.wait(pause):
            failed = self._attempt() is not None
            pause = min(4 * pause, LONGEST_PAUSE_SECONDS) if failed else POLL_SECONDS

    def _attempt(self) -> Exception | None:
        try:
            for record in self._reader.new_records():
                self._waiting += metrics_of(record)
            if self._waiting:
                with patience():
                    self._send()
        except Exception as error:  # whatever the disk, MLflow, SQLAlchemy or the network raise
            if self._last_steps is not None:
                logger.warning(
                    "metrics cannot be sent to MLflow (%s). Training goes on; they stay in the "
                    "journal and are sent when MLflow is back.",
                    first_line(error),
                )
            self._last_steps = None
            return error
        return None

    def _send(self) -> None:
        if self._last_steps is None:
            self._last_steps = self._ask()
            logger.info("MLflow answers again: sending the metrics that were kept")
        while self._waiting:
            self._send_batch(self._waiting[:BATCH], self._last_steps)
            del self._waiting[:BATCH]

    def _send_batch(self, batch: list[Metric], last_steps: dict[str, int]) -> None:
        new: dict[tuple[str, int], Metric] = {}
        for metric in batch:
            if metric.step > last_steps.get(metric.key, -1):
                new.setdefault((metric.key, metric.step), metric)  # the first of a step counts
        if not new:
            return
        self._client.log_batch(self._run_id, metrics=list(new.values()))
        for key, step in new:
            last_steps[key] = max(step, last_steps.get(key, -1))
        self._on_sent(max(last_steps.values()))

    def _ask(self) -> dict[str, int]:
        """The last step of each metric, as the server has it."""
        with patience():
            metrics = self._client.get_run(self._run_id).data.to_proto().metrics
        return {metric.key: metric.step for metric in metrics}


def metrics_of(record: Mapping[str, Any]) -> list[Metric]:
    """Metrics of one record of the journal; values that are not finite are left out.

    Of a run's last record only what no other record has: the test split's metrics, and
    ``RESULTS``, those of the weights that were kept; their step is ``ONCE``. The journal keeps
    every digit, MLflow gets those that a person reads.
    """
    step, time = int(record["step"]), int(1000 * record.get("time", 0.0))
    metrics: Mapping[str, Any] = record.get("metrics", {})
    if record["kind"] == "end":
        step = ONCE
        metrics = {
            RESULTS.get(key, key): value
            for key, value in metrics.items()
            if key in RESULTS or key.startswith("test/")
        }
    return [
        Metric(metric_name(key), readable(value), time, step)
        for key, value in metrics.items()
        if math.isfinite(value)
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
