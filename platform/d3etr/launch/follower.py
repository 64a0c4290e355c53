"""Follow a run's journal from the driver and show its records.

Training writes the journal and knows nobody who reads it: what happens here (a broken terminal)
never reaches a training step. Tracking follows the same file with a reader of its own.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from d3etr.engine.journal import JournalReader, Record, follow_journal
from d3etr.logs import get_logger

logger = get_logger(__name__)

POLL_SECONDS = 0.2


class Consumer(Protocol):
    """Anything that wants journal records."""

    def consume(self, record: Record) -> None:
        """Take one record."""
        ...


class JournalFollower:
    """A thread that feeds a display with what is written to a run's journal after ``start``."""

    def __init__(self, journal: Path, display: Consumer) -> None:
        self._journal, self._reader = journal, JournalReader(journal)
        self._display, self._warned = display, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        try:
            for _ in self._reader.new_records():
                pass
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
                self._show(record)
        except OSError as error:
            logger.warning("cannot read %s: %s", self._journal, error)
            return self._stop.is_set()
        return True

    def _show(self, record: Record) -> None:
        try:
            self._display.consume(record)
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "the progress display failed and misses records; training is not affected: %r",
                    error,
                )
            self._warned = True
