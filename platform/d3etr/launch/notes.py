"""What workers write down for their peers and the driver about why a run must end.

Notes rather than exceptions: to Ray an exception is a lost worker, and it would try again what
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
class Notes:
    """The notes of one launch.

    Attributes:
        folder: on storage that all workers and the driver share.
    """

    folder: Path

    @property
    def reason_file(self) -> Path:
        """Where the reason stands."""
        return self.folder / "reason.json"

    def end(self, reason: Reason) -> None:
        """Say why the run must end, unless it was said: the first reason causes the others."""
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

    def comes_back(self, rank: int, error: Exception, progress: str) -> bool:
        """Remember a worker's exception; True if it is the one that ended the last attempt.

        Args:
            rank: the worker.
            error: what it raised.
            progress: says how far the run was; the same exception after progress is another.
        """
        file = self.folder / f"failure-{rank}.json"
        failure = {"error": redacted(repr(error)), "progress": progress, "text": self.text(error)}
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_text(file, json.dumps(failure))
        return all(before.get(key) == failure[key] for key in ("error", "progress"))

    def failure(self, rank: int) -> str | None:
        """The traceback of a worker's last exception."""
        file = self.folder / f"failure-{rank}.json"
        if not file.exists():
            return None
        return str(json.loads(file.read_text(encoding="utf-8"))["text"])

    def ask_to_regroup(self) -> None:
        """The driver wants to start the workers as another number of them."""
        write_text(self._regroup_file, "")

    def withdraw(self) -> None:
        """The driver does not want that any more, or it was done."""
        self._regroup_file.unlink(missing_ok=True)
        self._regrouping_file.unlink(missing_ok=True)

    def regroup_asked(self) -> bool:
        """Whether the driver wants it."""
        return self._regroup_file.exists()

    def leave_to_regroup(self) -> None:
        """The workers end, for the driver to start others."""
        write_text(self._regrouping_file, "")

    def left_to_regroup(self) -> bool:
        """Whether the workers did."""
        return self._regrouping_file.exists()

    @property
    def _regroup_file(self) -> Path:
        return self.folder / "regroup"

    @property
    def _regrouping_file(self) -> Path:
        return self.folder / "regrouping"

    @staticmethod
    def text(error: Exception) -> str:
        """The traceback of ``error``."""
        return redacted("".join(traceback.format_exception(error)).strip())
