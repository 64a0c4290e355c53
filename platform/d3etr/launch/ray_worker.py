"""What runs inside a Ray Train worker."""

from __future__ import annotations

import logging
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
from d3etr.launch.resources import threads_for
from d3etr.launch.task import Task
from d3etr.launch.worker_watchdog import WorkerWatchdog

ECHO_SECONDS = 3.0
"""A peer's mistake breaks collective operations here; its reason is there within this time."""


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


class Regroup(Exception):  # noqa: N818 - not an error
    """The workers end in order, for the driver to start another number of them."""


class RayContext(ProcessGroup):
    """A Ray Train worker's view of the run; Ray has made the process group.

    Args:
        assignment: of the worker.
    """

    def __init__(self, assignment: Assignment) -> None:
        # Without GPUs asked for, Ray would still offer the machine's first one.
        gpu = assignment.gpu
        super().__init__(ray.train.torch.get_device() if gpu else torch.device("cpu"))
        self._control = assignment.control
        self._elastic = assignment.config.cluster.minimum_workers is not None

    def report(self, metrics: dict[str, float]) -> None:
        """Tell the controller that an epoch is done; also Ray's sign of life."""
        ray.train.report({name: float(value) for name, value in metrics.items()})

    def saved(self) -> None:
        """Leave here if the driver wants another number of workers: nothing is lost.

        Raises:
            Regroup: on all workers alike.
        """
        if not self._elastic:
            return
        requested = self.rank == 0 and self._control.regroup_request.exists()
        if not self.all_reduce(torch.tensor(int(requested), device=self.device)):
            return
        if self.rank == 0:
            self._control.regroup_reply.touch()
        raise Regroup


def work(settings: dict[str, Assignment]) -> None:
    """Run the task; called by Ray in each worker.

    A user's mistake is noted and ends all workers in order, so that Ray does not try again. So
    is an exception that comes back unchanged: the next attempt would meet it too.
    """
    assignment = settings["assignment"]
    if assignment.control.reason() is not None:  # started again though the run must end
        return
    _ensure_shared_folder(assignment)
    _set_threads(assignment)
    context = RayContext(assignment)
    watchdog = WorkerWatchdog(assignment.run_dir, assignment.token, assignment.control)
    with watchdog, relayed_warnings(assignment.run_dir, context.rank):
        try:
            assignment.task(assignment.config, assignment.run_dir, context)
        except Regroup:
            return
        except Exception as error:
            if not _ends_in_order(assignment, context, error):
                raise


def _ends_in_order(assignment: Assignment, context: RayContext, error: Exception) -> bool:
    """Whether the run must end, because of ``error`` or of what happened to a peer."""
    control = assignment.control
    if isinstance(error, UserError):
        control.end(Reason("mistake", str(error)))
        dist.destroy_process_group()  # peers that wait for this worker get an exception
    elif context.world_size > 1 and control.wait_for_reason(ECHO_SECONDS) is not None:
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


def _ensure_shared_folder(assignment: Assignment) -> None:
    """Refuse to write to a folder that only looks like the driver's."""
    try:
        owner = read_owner(RunFolder(assignment.run_dir).lock)
    except FileNotFoundError:
        owner = None
    if owner is None or owner.token != assignment.token:
        raise RuntimeError(
            f"the run folder {assignment.run_dir} is not the driver's on this machine: "
            "run.output must be on storage that all machines of the cluster share"
        )


def _set_threads(assignment: Assignment) -> None:
    here = ray.train.get_context().get_local_world_size()
    omp_threads = assignment.omp_threads
    torch.set_num_threads(threads_for(assignment.config.cluster, here, omp_threads))


class Relay(logging.Handler):
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
    if rank != 0:
        yield
        return
    handler, ours = Relay(Journal(RunFolder(run_dir).journal)), logging.getLogger("d3etr")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
