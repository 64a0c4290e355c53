"""One writer per run folder, on storage that several machines may share.

A lock is a file that only one process can create (``O_EXCL``), names its owner, and is touched
every few seconds. Where the owner runs on this machine, its process decides whether the lock is
live; elsewhere the lock is watched, whatever clocks say.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter, ValidationError

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors
from d3etr.launch.process import held, interrupt
from d3etr.logs import get_logger

logger = get_logger(__name__)

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""An owner on another machine that is silent while it is watched so long is taken for dead."""
GRACE_SECONDS = 3.0
"""Pause after a takeover: workers of the dead owner notice within this time and leave."""


class RunLockedError(UserError):
    """Another process is writing to the run folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: a process on a host, and since when (unix seconds)."""

    token: str
    host: str
    pid: int
    process: str
    since: float

    @classmethod
    def this_process(cls) -> Owner:
        """A fresh owner for the running process."""
        return cls(
            uuid.uuid4().hex, socket.gethostname(), os.getpid(), _process(os.getpid()), time.time()
        )

    @property
    def here(self) -> bool:
        """Whether its process can be looked up from this one."""
        return self.host == socket.gethostname() and self.process.split(":")[0] == _namespace()

    def runs(self) -> bool:
        """Whether the process of an owner that is here still runs."""
        return _process(self.pid) == self.process

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} on {self.host}, since {since}"


def _namespace() -> str:
    """Containers on one host share its name but not its process ids."""
    try:
        return os.readlink("/proc/self/ns/pid").removeprefix("pid:")
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Namespace and start time of a process, so that a reused id is another; "" if gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{_namespace()}:"
    # A zombie (state Z) holds its id but writes nothing. Field 22 of stat is the start time;
    # the split begins at field 3.
    return "" if fields[0] == "Z" else f"{_namespace()}:{fields[19]}"


def read_owner(path: Path) -> Owner | None:
    """Who holds the lock; None if its file is not (yet) readable as one.

    Raises:
        FileNotFoundError: nobody holds it.
    """
    try:
        return TypeAdapter(Owner).validate_json(path.read_bytes(), strict=True)
    except ValidationError:
        return None


def _beats(path: Path) -> bool:
    """Whether somebody elsewhere still touches the lock; it takes its time where nobody does.

    Raises:
        FileNotFoundError: nobody holds it any more.
    """
    touched, end = _touched(path), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT_SECONDS))
        if _touched(path) != touched:
            return True
    return False


def _touched(path: Path) -> int:
    """When, as far as only a change matters; opened, for network storage to look anew."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


class RunLock:
    """Holds a run folder for as long as the ``with`` block runs.

    Entering raises ``RunLockedError`` if a live process holds the folder; the lock of a dead one is
    taken over with a warning.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = RunFolder(run_dir).lock
        self.owner = Owner.this_process()
        self.lost = False
        """True once another process has taken the lock away."""
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        if not self._create():
            self._take_over()
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with held():
            self._released.set()
            self._heart.join()
            if self._is_ours():
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        with clear_disk_errors("the run's lock", self.path.parent):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(self.owner)))
            except OSError:
                self.path.unlink(missing_ok=True)  # an empty one would be watched for a minute
                raise
        return True

    def _take_over(self) -> None:
        """Replace the lock of a dead owner.

        The old file is moved aside first: of several processes that try at once, one gets it.
        """
        try:
            dead = self._dead_owner()
            aside = self.path.with_name(f".lock-{self.owner.token}")
            self.path.rename(aside)
        except FileNotFoundError:
            dead = aside = None
        if aside is not None:
            moved = read_owner(aside)
            if moved is not None and moved != dead:
                aside.rename(self.path)
                raise self._locked(moved)
            aside.unlink()
            logger.warning("took over %s: its owner (%s) is gone", self.path, dead)
        if not self._create():
            raise self._locked(read_owner(self.path))
        if aside is not None:
            time.sleep(GRACE_SECONDS)
        if not self._is_ours():
            raise self._locked(None)

    def _dead_owner(self) -> Owner | None:
        owner = read_owner(self.path)
        alive = owner.runs() if owner is not None and owner.here else _beats(self.path)
        if alive:
            raise self._locked(owner)
        return owner

    def _locked(self, owner: Owner | None) -> RunLockedError:
        return RunLockedError(
            f"{self.path.parent} is in use by another run ({owner or 'owner not readable yet'}).\n"
            "Two runs must not write to one folder. Wait for it or stop it; to train the same "
            "recipe beside it, give this one another name: --set run.name=NAME.\n"
            f"If that process is certainly gone, remove {self.path}."
        )

    def _is_ours(self) -> bool:
        try:
            return read_owner(self.path) == self.owner
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                owner = read_owner(self.path)
                os.utime(self.path)
            except FileNotFoundError:
                owner = None
            except OSError as error:
                logger.warning("cannot touch %s: %s", self.path, error)
                continue
            if owner != self.owner:
                self.lost = True
                logger.error("%s was taken over by another run (%s)", self.path, owner)
                interrupt()
                return
