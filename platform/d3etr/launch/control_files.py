"""Small files by which the driver and the workers of one launch control each other.

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

    def reason(self) -> Reason | None:
        """Why the run must end; None if it need not."""
        try:
            return Reason(**json.loads(self.reason_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def wait_for_reason(self, seconds: float) -> Reason | None:
        """The reason, if one is given within ``seconds``."""
        end = time.monotonic() + seconds
        while (reason := self.reason()) is None and time.monotonic() < end:
            time.sleep(0.1)
        return reason

    def repeats(self, rank: int, error: Exception, progress: str) -> bool:
        """Keep a worker's exception; True if it is the one that ended the last attempt.

        Args:
            rank: the worker.
            error: what it raised.
            progress: how far the run was; the same exception after progress is another.
        """
        failure = {"error": redacted(repr(error)), "progress": progress, "text": as_text(error)}
        before = self._failure(rank)
        write_text(self._failure_file(rank), json.dumps(failure))
        return all(before.get(key) == failure[key] for key in ("error", "progress"))

    def failure(self, rank: int) -> str | None:
        """The traceback of a worker's last exception."""
        return self._failure(rank).get("text")

    def _failure_file(self, rank: int) -> Path:
        return self.folder / f"failure-{rank}.json"

    def _failure(self, rank: int) -> dict[str, str]:
        file = self._failure_file(rank)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def regroup_request(self) -> Path:
        """Exists while the driver wants to start the workers as another number of them."""
        return self.folder / "regroup"

    @property
    def regroup_reply(self) -> Path:
        """Exists once the workers have ended for that."""
        return self.folder / "regrouping"


def as_text(error: Exception) -> str:
    """The traceback of ``error``, without credentials."""
    return redacted("".join(traceback.format_exception(error)).strip())
