"""Follow a run's journal from the driver and pass its records on.

Training writes the journal and knows nobody who reads it: what happens here (a broken terminal,
a tracking server that is down) never reaches a training step.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from d3etr.logs import get_logger
from d3etr.training.journal import JournalReader, Record, follow_journal

logger = get_logger(__name__)

POLL_SECONDS = 0.2


class Consumer(Protocol):
    """Anything that wants journal records."""

    def consume(self, record: Record) -> None:
        """Take one record."""
        ...


class OnceOnly:
    """Passes records on, but no step of a kind a second time.

    After a failure, training goes on from its last checkpoint and repeats steps that were
    already passed on; with the same seed they are the same numbers.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._newest: dict[str, int] = {}

    def consume(self, record: Record) -> None:
        """Pass ``record`` on unless metrics of its kind and step were seen before."""
        if "metrics" in record:
            kind, step = str(record["kind"]), int(record["step"])
            if step <= self._newest.get(kind, -1):
                return
            self._newest[kind] = step
        self._consumer.consume(record)


class Guarded:
    """Passes records on; the first exception of the consumer becomes a warning."""

    def __init__(self, consumer: Consumer, name: str) -> None:
        self._consumer = consumer
        self._name = name
        self._warned = False

    def consume(self, record: Record) -> None:
        """Pass ``record`` on."""
        try:
            self._consumer.consume(record)
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "%s failed and misses records; training is not affected: %r", self._name, error
                )
            self._warned = True


class JournalFollower:
    """A thread that feeds ``console`` and ``tracker`` from a run's journal.

    The tracker gets the whole journal, each step once. The console gets what is written after
    ``start``.
    """

    def __init__(self, journal: Path, console: Consumer, tracker: Consumer | None) -> None:
        self._journal, self._reader = journal, JournalReader(journal)
        self._console = Guarded(console, "the progress display")
        self._tracker = Guarded(OnceOnly(tracker), "tracking") if tracker is not None else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        try:
            for record in self._reader.new_records():
                self._track(record)
        except OSError as error:
            logger.warning("cannot read %s: %s", self._journal, error)
        self._thread.start()

    def stop(self) -> None:
        """Pass on what was written until now and end the thread."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._read():
            self._stop.wait(POLL_SECONDS)

    def _read(self) -> bool:
        """Follow until stopped; False if the storage failed and reading must begin again."""
        try:
            for record in follow_journal(self._reader, self._stop.is_set, POLL_SECONDS):
                self._console.consume(record)
                self._track(record)
        except OSError as error:
            logger.warning("cannot read %s: %s", self._journal, error)
            return self._stop.is_set()
        return True

    def _track(self, record: Record) -> None:
        if self._tracker is not None:
            self._tracker.consume(record)
