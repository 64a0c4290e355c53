"""Sends metrics to MLflow from a thread of its own, so that training never waits for it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d3etr.logs import get_logger
from d3etr.tracking.metrics import Marks, Point, Record, metric_points
from d3etr.tracking.server import patience

logger = get_logger(__name__)

BATCH = 500
"""Points per request; MLflow takes at most 1000."""
GATHER_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
LAST_PAUSES_SECONDS = (1.0, 3.0, 0.0)
"""After each attempt of a run that ends."""


def known_marks(client: MlflowClient, run_id: str) -> Marks:
    """The last step of each metric, as the server knows it."""
    metrics = client.get_run(run_id).data.to_proto().metrics
    return Marks({metric.key: metric.step for metric in metrics})


class Sender:
    """Takes journal records at any time and sends what MLflow does not have yet.

    A request that failed may have been carried out all the same, so after a failure the
    server is asked what it has before anything is sent again.
    """

    def __init__(
        self, client: MlflowClient, run_id: str, marks: Marks, on_sent: Callable[[int], None]
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._marks = marks
        self._on_sent = on_sent
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._waiting: list[Point] = []
        self._in_doubt = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()

    @property
    def last_step(self) -> int:
        """Last step that MLflow has confirmed."""
        return self._marks.last_step

    def put(self, record: Record) -> None:
        """Take a record; returns at once."""
        self._records.put(record)

    def close(self, records: Sequence[Record]) -> Exception | None:
        """Stop the thread and send ``records`` as far as MLflow does not have them.

        Returns:
            What went wrong, None if MLflow has everything.
        """
        self._closing.set()
        self._records.put(None)
        self._thread.join()
        self._waiting = [point for record in records for point in metric_points(record)]
        for pause in LAST_PAUSES_SECONDS:
            if (failure := self._attempt()) is None:
                return None
            time.sleep(pause)
        return failure

    def _work(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._closing.is_set():
            self._gather()
            failure = self._attempt()
            if failure is None:
                pause = FIRST_PAUSE_SECONDS
                continue
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _gather(self) -> None:
        """Wait for a record unless some are waiting, then take those that come soon after."""
        if not self._waiting:
            self._take(self._records.get())
        deadline = time.monotonic() + GATHER_SECONDS
        while not self._closing.is_set():
            try:
                self._take(self._records.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return

    def _take(self, record: Record | None) -> None:
        if record is not None:
            self._waiting += metric_points(record)

    def _attempt(self) -> Exception | None:
        try:
            with patience():
                self._send()
        except Exception as error:  # whatever MLflow, SQLAlchemy or the network raise
            self._note_failure(error)
            return error
        return None

    def _send(self) -> None:
        if self._in_doubt:
            self._marks = known_marks(self._client, self._run_id)
            self._in_doubt = False
            logger.info("MLflow answers again: sending the metrics that were kept")
        while self._waiting:
            points = self._waiting[:BATCH]
            self._send_batch([point for point in points if self._marks.is_new(point)])
            del self._waiting[: len(points)]

    def _send_batch(self, points: list[Point]) -> None:
        # A metric that comes twice in a batch: the first of each step counts.
        unique = list({(point.key, point.step): point for point in reversed(points)}.values())
        if not unique:
            return
        metrics = [Metric(p.key, p.value, int(1000 * p.time), p.step) for p in reversed(unique)]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._marks.add(points)
        self._on_sent(self._marks.last_step)

    def _note_failure(self, error: Exception) -> None:
        if not self._in_doubt:
            logger.warning(
                "MLflow does not take metrics (%s). Training goes on; they stay in the journal "
                "and are sent when MLflow is back.",
                str(error).strip().splitlines()[0][:200],
            )
        self._in_doubt = True
