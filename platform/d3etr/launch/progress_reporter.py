"""What a person sees of a run: a progress bar on a terminal, else a line per epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO

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

from d3etr.engine.journal import Record
from d3etr.logs import get_logger
from d3etr.progress import counted, duration
from d3etr.text import LINES, printable, styled

logger = get_logger(__name__)

QUIET_SECONDS = 60.0
"""Without a terminal, a line is written at least this often while steps are made."""


class Display(Protocol):
    """Shows a run to a person."""

    def consume(self, record: Record) -> None:
        """Show what a journal record holds."""
        ...

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Show what is being done before the first record or after the last; ``OnProgress``."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def open_display(quiet: bool = False, stream: TextIO | None = None) -> Display:
    """The display that fits: none, a bar, or lines (``stream`` defaults to standard error)."""
    stream = stream or sys.stderr
    if quiet:
        return NullDisplay()
    return Bar(Console(file=styled(stream))) if stream.isatty() else Lines(stream)


class NullDisplay:
    """Shows warnings alone."""

    def consume(self, record: Record) -> None:
        """Log a warning; show no progress."""
        if record["kind"] == "message" and record.get("level") == "warning":
            logger.warning("warning: %s", record["text"])

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to leave."""


class ProgressReporter:
    """Turns journal records into lines for a person, where one is due."""

    def __init__(self) -> None:
        self.steps = 0
        """Optimiser steps of the whole run; 0 until known."""
        self.metrics: dict[str, float] = {}
        """Newest value of every metric."""
        self._steps_per_epoch = 1
        self._start = (0.0, 0)
        self._reported_step = -1

    def line(self, record: Record) -> str | None:
        """A line about ``record``, or None."""
        self.metrics.update(record.get("metrics") or {})
        kind = record.get("kind")
        if kind == "start":
            return self._starts(record)
        if kind == "teacher":
            return f"teacher: {scores(record['metrics'], 'teacher/')}"
        if kind == "evaluation":
            return self.position(record)
        if kind == "message":
            mark = "warning: " if record.get("level") == "warning" else ""
            return printable(f"{mark}{record.get('text', '')}", LINES)
        return None

    def position(self, record: Record) -> str:
        """A line with step, loss, accuracy, speed and the time that is left."""
        step = int(record["step"])
        self._reported_step = step
        parts = [self._epoch(record), f"step {step}/{self.steps or '?'}"]
        if "train/loss" in self.metrics:
            parts.append(f"loss {self.metrics['train/loss']:.3f}")
        if record.get("kind") == "evaluation":
            parts.append(scores(record["metrics"], "val/"))
        if "time/images_per_second" in self.metrics:
            rate = self.metrics["time/images_per_second"]
            parts.append(f"{rate:.{0 if rate >= 10 else 1}f} images/s")
        parts.append(self._remaining(record))
        return " | ".join(part for part in parts if part)

    def unreported_epoch(self, record: Record) -> bool:
        """Whether a step record follows the end of an epoch that no line was about."""
        ended = (int(record["step"]) - 1) // self._steps_per_epoch * self._steps_per_epoch
        return record.get("kind") == "step" and ended > max(self._reported_step, self._start[1])

    def _starts(self, record: Record) -> str:
        again = self.steps > 0
        self.steps, step = int(record["steps"]), int(record["step"])
        self._steps_per_epoch = max(1, int(record.get("steps_per_epoch") or self.steps or 1))
        self._start = (_clock(record), step)
        self._reported_step = step
        if again:
            return f"training was interrupted; going on from step {step} of {self.steps}"
        if step:
            return f"going on from the checkpoint at step {step} of {self.steps}"
        return f"training {self.steps} steps, {self._steps_per_epoch} an epoch"

    def _epoch(self, record: Record) -> str:
        epochs = -(-self.steps // self._steps_per_epoch)
        done = int(record["step"]) / self._steps_per_epoch
        return f"epoch {round(done, 2):g}/{epochs}"

    def _remaining(self, record: Record) -> str:
        start, first = self._start
        done = int(record["step"]) - first
        left = self.steps - int(record["step"])
        if done <= 0 or left <= 0:
            return ""
        return f"{duration((_clock(record) - start) / done * left)} left"


def _clock(record: Record) -> float:
    """Seconds that only differences are taken of: those that no setting of the clock moves."""
    clock = record.get("elapsed", record.get("time"))
    return 0.0 if clock is None else float(clock)


def scores(metrics: Mapping[str, float], prefix: str) -> str:
    """The COCO numbers among ``metrics`` (fractions) in percent."""
    names = [name for name in ("mAP", "AP50", "AP75") if prefix + name in metrics]
    return "  ".join(f"{name} {100 * metrics[prefix + name]:.1f}" for name in names)


class Lines:
    """A readable line per epoch and evaluation, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reporter = ProgressReporter()
        self._written = time.monotonic()

    def consume(self, record: Record) -> None:
        """Write a line if ``record`` is worth one."""
        line = self._reporter.line(record)
        if line is None and record.get("kind") == "step":
            long_silence = time.monotonic() - self._written > QUIET_SECONDS
            if long_silence or self._reporter.unreported_epoch(record):
                line = self._reporter.position(record)
        if line is not None:
            self._write(line)

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Write a line."""
        self._write(counted(text, done, total))

    def close(self) -> None:
        """Nothing to leave."""

    def _write(self, line: str) -> None:
        self._written = time.monotonic()
        self._stream.write(f"{line}\n")
        self._stream.flush()


class Bar:
    """A progress bar with loss, mAP and the time that is left; lines scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._reporter = ProgressReporter()
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

    def consume(self, record: Record) -> None:
        """Move the bar; write a line above it if ``record`` is worth one."""
        line = self._reporter.line(record)
        if line is not None:
            self._progress.console.print(escape(line), highlight=False)
        kind = record.get("kind")
        if kind == "start":
            self._progress.reset(self._task, total=self._reporter.steps, description="training")
        if kind in ("start", "step", "evaluation"):
            self._progress.update(self._task, completed=int(record["step"]), state=self._state())

    def on_progress(self, text: str, done: int = 0, total: int = 0, /) -> None:
        """Describe the bar by ``text``, and move it where there is a total."""
        self._progress.update(self._task, description=escape(printable(text)))
        if total:
            self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()

    def _state(self) -> str:
        metrics = self._reporter.metrics
        loss = f"loss {metrics['train/loss']:.3f}" if "train/loss" in metrics else ""
        return f"{loss}  {scores(metrics, 'val/').partition('  ')[0]}".strip()
