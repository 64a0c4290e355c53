"""Sends a journal's metrics to MLflow from a thread of its own: training never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d3etr.engine.journal import JournalReader
from d3etr.logs import get_logger
from d3etr.tracking.metrics import Point, metric_points
from d3etr.tracking.server import first_line, patience

logger = get_logger(__name__)

BATCH = 500
"""Points per request; MLflow takes at most 1000."""
POLL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LAST_PAUSES_SECONDS = (1.0, 3.0, 0.0)
"""After each attempt of a run that ends."""


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
        self._waiting: list[Point] = []
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
                self._waiting += metric_points(record)
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

    def _send_batch(self, points: Sequence[Point], last_steps: dict[str, int]) -> None:
        new: dict[tuple[str, int], Point] = {}
        for point in points:
            if point.step > last_steps.get(point.key, -1):
                new.setdefault((point.key, point.step), point)  # the first of each step counts
        if not new:
            return
        metrics = [Metric(p.key, p.value, int(1000 * p.time), p.step) for p in new.values()]
        self._client.log_batch(self._run_id, metrics=metrics)
        for key, step in new:
            last_steps[key] = max(step, last_steps.get(key, -1))
        self._on_sent(max(last_steps.values()))

    def _ask(self) -> dict[str, int]:
        """The last step of each metric, as the server has it."""
        with patience():
            metrics = self._client.get_run(self._run_id).data.to_proto().metrics
        return {metric.key: metric.step for metric in metrics}
