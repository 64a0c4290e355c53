"""Small files by which the workers of one launch tell its driver how the run must end.

Files rather than exceptions: to Ray an exception is a lost worker, and it would try again what
cannot succeed.
"""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from d3etr.files import write_text
from d3etr.text import redacted


@dataclass(frozen=True)
class Reason:
    """Why a run must end: a user's mistake, or a failure that came back unchanged."""

    kind: Literal["mistake", "failure"]
    text: str


@dataclass(frozen=True)
class ControlFiles:
    """The files of one launch.

    Attributes:
        folder: on storage that all workers and the driver share.
    """

    folder: Path

    @property
    def reason_file(self) -> Path:
        """Holds the reason why the run must end."""
        return self.folder / "reason.json"

    def end(self, reason: Reason) -> None:
        """Have the run end, unless it must already: the first reason causes the others."""
        if not self.reason_file.exists():
            write_text(self.reason_file, json.dumps(asdict(reason)))

    def reason(self, seconds: float = 0) -> Reason | None:
        """Why the run must end, if that is known within ``seconds``."""
        end = time.monotonic() + seconds
        while not self.reason_file.exists():
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)
        return Reason(**json.loads(self.reason_file.read_text(encoding="utf-8")))

    def repeats(self, rank: int, error: Exception, progress: str) -> bool:
        """Keep a worker's exception; True if it is the one that ended the last attempt.

        Args:
            rank: the worker.
            error: what it raised.
            progress: how far the run was, a line; the same after progress is another exception.
        """
        file, text = self.folder / f"failure-{rank}.txt", f"{progress}\n{as_text(error)}"
        before = file.read_text(encoding="utf-8") if file.exists() else None
        write_text(file, text)
        return before == text

    def failure(self, rank: int) -> str | None:
        """The traceback of a worker's last exception."""
        file = self.folder / f"failure-{rank}.txt"
        return file.read_text(encoding="utf-8").partition("\n")[2] if file.exists() else None


def as_text(error: Exception) -> str:
    """The traceback of ``error``, without credentials."""
    return redacted("".join(traceback.format_exception(error)).strip())
