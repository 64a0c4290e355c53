"""Work that may take one machine much longer than another, such as fetching data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import Journal
from d3etr.progress import OnProgress, PacedProgress

T = TypeVar("T")
POLL_SECONDS = 0.5
LINE_SECONDS = 10.0


def run_on_all_workers(work: Callable[[], T], context: TrainContext) -> T:
    """Do something on every worker and go on when all have done it, however long that takes.

    A barrier would fail on the time limit of collective operations. Here a thread works, and
    the workers ask each other every half second who is done.

    Args:
        work: done by each worker.
        context: the workers.

    Returns:
        What this worker's ``work`` returned.

    Raises:
        Exception: what this worker's ``work`` raised; the others learn of it as of any other
            end of a peer.
    """
    if context.world_size == 1:
        return work()
    job = _Job(work)
    while True:
        done = torch.tensor(int(job.done), device=context.device)
        if int(context.all_reduce(done)) == context.world_size:
            return job.result()
        if job.failed:
            return job.result()
        time.sleep(POLL_SECONDS)


class _Job(Generic[T]):
    """Work in a thread, which ends with the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="worker-task", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return bool(self._results)

    @property
    def failed(self) -> bool:
        return bool(self._errors)

    def result(self) -> T:
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._errors.append(error)


def journal_progress(journal: Journal) -> OnProgress:
    """Writes about long work into a run's journal, which the driver shows, every few seconds."""
    return PacedProgress(lambda line: journal.message(0, line), LINE_SECONDS, LINE_SECONDS)
