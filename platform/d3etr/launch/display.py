"""What a person sees of a run: a progress bar on a terminal, else a line per epoch.

Training writes the journal and knows nobody who reads it: what happens here (a broken terminal)
never reaches a training step.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from d3etr.engine.journal import JournalReader, Record
from d3etr.logs import get_logger
from d3etr.progress import counted, duration, stamped
from d3etr.text import LINES, printable, styled

logger = get_logger(__name__)

POLL_SECONDS = 0.2
QUIET_SECONDS = 60.0
"""Without a terminal, a line is written at least this often while steps are made."""


class Display:
    """Shows warnings alone; what shows more derives from it."""

    def consume(self, record: Record) -> None:
        """Show what a journal record holds."""
        if record["kind"] == "message" and record.get("level") == "warning":
            logger.warning("warning: %s", record["text"])

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Show what is being done before the first record or after the last; ``OnProgress``."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_display(quiet: bool = False, stream: TextIO | None = None) -> Display:
    """The display that fits: warnings, a bar, or lines (``stream`` defaults to standard error)."""
    stream = stream or sys.stderr
    if quiet:
        return Display()
    return Bar(Console(file=styled(stream))) if stream.isatty() else Lines(stream)


class Lines(Display):
    """A readable line per epoch and evaluation, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._written = stream, time.monotonic()
        self.steps = 0
        """Optimiser steps of the whole run; 0 until known."""
        self.metrics: dict[str, float] = {}
        """Newest value of every metric."""
        self._steps_per_epoch = 1
        self._start = (0.0, 0)
        self._reported_step = -1

    def consume(self, record: Record) -> None:
        """Write a line if ``record`` is worth one."""
        line = self._line(record)
        if line is not None:
            self.write(line)

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Write a line."""
        self.write(counted(text, done, total))

    def write(self, line: str) -> None:
        """Write one line."""
        self._written = time.monotonic()
        self._stream.write(f"{stamped(line)}\n")
        self._stream.flush()

    def steps_are_due(self, step: int) -> bool:
        """Whether a step is worth a line: after an epoch without one, or long silence."""
        ended = (step - 1) // self._steps_per_epoch * self._steps_per_epoch
        silent = time.monotonic() - self._written > QUIET_SECONDS
        return silent or ended > max(self._reported_step, self._start[1])

    def _line(self, record: Record) -> str | None:
        self.metrics.update(record.get("metrics") or {})
        kind = record.get("kind")
        if kind == "start":
            return self._starts(record)
        if kind == "teacher":
            return f"teacher: {scores(record['metrics'], 'teacher/')}"
        if kind == "evaluation" or (kind == "step" and self.steps_are_due(int(record["step"]))):
            return self._position(record)
        if kind == "message":
            mark = "warning: " if record.get("level") == "warning" else ""
            return printable(f"{mark}{record.get('text', '')}", LINES)
        return None

    def _starts(self, record: Record) -> str:
        again = self.steps > 0
        self.steps, step = int(record["steps"]), int(record["step"])
        self._steps_per_epoch = max(1, int(record.get("steps_per_epoch") or self.steps or 1))
        self._start, self._reported_step = (_clock(record), step), step
        if again:
            return f"training was interrupted; going on from step {step} of {self.steps}"
        if step:
            return f"going on from the checkpoint at step {step} of {self.steps}"
        return f"training {self.steps} steps, {self._steps_per_epoch} an epoch"

    def _position(self, record: Record) -> str:
        """A line with step, loss, accuracy, speed and the time that is left."""
        step = self._reported_step = int(record["step"])
        epochs = -(-self.steps // self._steps_per_epoch)
        parts = [f"epoch {round(step / self._steps_per_epoch, 2):g}/{epochs}"]
        parts.append(f"step {step}/{self.steps or '?'}")
        if "train/loss" in self.metrics:
            parts.append(f"loss {self.metrics['train/loss']:.3f}")
        if record.get("kind") == "evaluation":
            parts.append(scores(record["metrics"], "val/"))
        if "time/images_per_second" in self.metrics:
            rate = self.metrics["time/images_per_second"]
            parts.append(f"{rate:.{0 if rate >= 10 else 1}f} images/s")
        begun, first = self._start
        if first < step < self.steps:
            seconds = (_clock(record) - begun) / (step - first) * (self.steps - step)
            parts.append(f"{duration(seconds)} left")
        return " | ".join(part for part in parts if part)


class Bar(Lines):
    """A progress bar with loss, mAP and the time that is left; lines scroll by above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.file)  # type: ignore[arg-type]
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, state="")
        self._progress.start()

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        self._progress.console.print(escape(stamped(line)), highlight=False)

    def steps_are_due(self, step: int) -> bool:
        """Never: the bar shows them."""
        return False

    def consume(self, record: Record) -> None:
        """Move the bar; write a line above it if ``record`` is worth one."""
        super().consume(record)
        kind = record.get("kind")
        if kind == "start":
            self._progress.reset(self._task, total=self.steps, description="training")
        if kind in ("start", "step", "evaluation"):
            loss = f"loss {self.metrics['train/loss']:.3f}" if "train/loss" in self.metrics else ""
            state = f"{loss}  {scores(self.metrics, 'val/').partition('  ')[0]}".strip()
            self._progress.update(self._task, completed=int(record["step"]), state=state)

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Describe the bar by ``text``, and move it where there is a total."""
        self._progress.update(self._task, description=escape(printable(text)))
        if total:
            self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


def _clock(record: Record) -> float:
    """Seconds that only differences are taken of: those that no setting of the clock moves."""
    clock = record.get("elapsed", record.get("time"))
    return 0.0 if clock is None else float(clock)


def scores(metrics: Mapping[str, float], prefix: str) -> str:
    """The COCO numbers among ``metrics`` (fractions) in percent."""
    names = [name for name in ("mAP", "AP50", "AP75") if prefix + name in metrics]
    return "  ".join(f"{name} {100 * metrics[prefix + name]:.1f}" for name in names)


class JournalFollower:
    """A thread that feeds a display with what is written to a run's journal after ``start``."""

    def __init__(self, journal: Path, display: Display) -> None:
        self._journal, self._reader = journal, JournalReader(journal)
        self._display, self._warned = display, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._read(lambda record: None)
        self._thread.start()

    def stop(self) -> None:
        """Pass on what was written until now and end the thread."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            last = self._stop.is_set()  # asked before reading: what was written until then is read
            self._read(self._show)
            if last:
                return
            self._stop.wait(POLL_SECONDS)

    def _read(self, take: Callable[[Record], None]) -> None:
        try:
            for record in self._reader.new_records():
                take(record)
        except OSError as error:
            logger.warning("cannot read %s: %s", self._journal, error)

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
