"""What runs inside a Ray Train worker."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from d3etr.config.tree import Config
from d3etr.engine.distributed import ProcessGroup
from d3etr.engine.journal import Journal
from d3etr.engine.run_folder import CHECKPOINT_PREFIX, RunFolder
from d3etr.errors import UserError
from d3etr.launch.control_files import ControlFiles, Reason, as_text
from d3etr.launch.lock import read_owner
from d3etr.launch.processes import Task
from d3etr.launch.resources import threads_for
from d3etr.logs import get_logger

logger = get_logger(__name__)

ECHO_SECONDS = 3.0
"""A peer's mistake breaks collective operations here; its reason is there within this time."""
WATCH_SECONDS = 1.0
LINGER_SECONDS = 15.0
"""A worker that still trains so long after the run was to end hangs, and is ended."""


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker needs to know.

    Attributes:
        task: what to run.
        config: the configuration, with absolute paths.
        run_dir: the run's folder, on storage that all workers share.
        token: identity of the driver that holds the folder's lock.
        control: where to say why the run must end.
        gpu: whether this worker was given a GPU.
        omp_threads: the driver's OMP_NUM_THREADS.
    """

    task: Task
    config: Config
    run_dir: Path
    token: str
    control: ControlFiles
    gpu: bool
    omp_threads: str | None


class RayContext(ProcessGroup):
    """A Ray Train worker's view of the run; Ray has made the process group."""

    def report(self, metrics: dict[str, float]) -> None:
        """Tell the controller that an epoch is done; also Ray's sign of life."""
        ray.train.report({name: float(value) for name, value in metrics.items()})


def work(settings: dict[str, Assignment]) -> None:
    """Run the task; called by Ray in each worker.

    A user's mistake is noted and ends all workers in order, so that Ray does not try again. So
    is an exception that comes back unchanged: the next attempt would meet it too.
    """
    assignment = settings["assignment"]
    if assignment.control.reason() is not None:  # started again though the run must end
        return
    if not _is_held(assignment.run_dir, assignment.token):
        raise RuntimeError(
            f"the run folder {assignment.run_dir} is not the driver's on this machine: "
            "run.output must be on storage that all machines of the cluster share"
        )
    here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(threads_for(assignment.config.cluster, here, assignment.omp_threads))
    # Without GPUs asked for, Ray would still offer the machine's first one.
    context = RayContext(ray.train.torch.get_device() if assignment.gpu else torch.device("cpu"))
    watched = watched_by_driver(assignment.run_dir, assignment.token, assignment.control)
    with watched, relayed_warnings(assignment.run_dir, context.rank):
        try:
            assignment.task(assignment.config, assignment.run_dir, context)
        except Exception as error:
            if not _ends_in_order(assignment, context, error):
                raise


def _ends_in_order(assignment: Assignment, context: RayContext, error: Exception) -> bool:
    """Whether the run must end, because of ``error`` or of what happened to a peer."""
    control = assignment.control
    if isinstance(error, UserError):
        control.end(Reason("mistake", str(error)))
        dist.destroy_process_group()  # peers that wait for this worker get an exception
    elif context.world_size > 1 and control.reason(ECHO_SECONDS) is not None:
        return True
    elif control.repeats(context.rank, error, _progress(assignment.run_dir)):
        # A lost connection may say the same twice and still heal.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return False
        control.end(Reason("failure", as_text(error)))
        dist.destroy_process_group()
    return control.reason() is not None


def _progress(run_dir: Path) -> str:
    saved = RunFolder(run_dir).checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
    return " ".join(sorted(path.name for path in saved))


def _is_held(run_dir: Path, token: str) -> bool:
    """Whether the driver holds the run; a lock that cannot be read now may be its lock."""
    try:
        owner = read_owner(RunFolder(run_dir).lock)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return owner is None or owner.token == token


@contextmanager
def watched_by_driver(run_dir: Path, token: str, control: ControlFiles) -> Iterator[None]:
    """End this process when its driver lost the run, or when the run's end left it hanging.

    When a driver is killed, Ray's workers go on for some seconds. A second driver that takes the
    run over in that time must not find two writers in one folder.

    Args:
        run_dir: the run's folder.
        token: identity of the worker's driver in the folder's lock.
        control: where workers write why the run must end.
    """
    done = threading.Event()

    def watch() -> None:
        foreign, end_since = 0, float("inf")
        while not done.wait(WATCH_SECONDS):
            # Seen twice: a rename on shared storage may hide the file for a moment.
            foreign = 0 if _is_held(run_dir, token) else foreign + 1
            if foreign >= 2:
                _exit("the run folder's lock is not held by this worker's driver any more")
            if control.reason_file.exists():
                end_since = min(end_since, time.monotonic())
            if time.monotonic() > end_since + LINGER_SECONDS:
                _exit("the run must end and this worker hangs")

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _exit(reason: str) -> None:
    """End the process, also while it waits inside a collective operation."""
    logger.error("worker %d ends: %s", os.getpid(), reason)
    logging.shutdown()
    os._exit(1)


class _Relay(logging.Handler):
    """Writes warnings into the journal, which the driver shows: Ray's logs stay on the node."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; a failure to do so is logging's to report."""
        try:
            self._journal.message(0, record.getMessage(), "warning")
        except Exception:
            self.handleError(record)


@contextmanager
def relayed_warnings(run_dir: Path, rank: int) -> Iterator[None]:
    """Relay what d3etr warns of to the driver for the time of the block, from rank 0 only."""
    handler, ours = _Relay(Journal(RunFolder(run_dir).journal)), logging.getLogger("d3etr")
    if rank == 0:
        ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
