"""Train under Ray Train: one to many workers on one to many machines.

Ray starts the workers, notices lost ones and starts the group again. Checkpoints, metrics and
their history are in the run's folder and not Ray's affair, so that a run can change launchers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import ray.train
import ray.train.torch

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch.driver import Launch, RunFailedError
from d3etr.launch.environment import in_temporary_copy
from d3etr.launch.notes import Notes, Reason
from d3etr.launch.ray_cluster import cluster_nodes, connected, free_resources
from d3etr.launch.ray_worker import Assignment, work
from d3etr.launch.resources import Demand, demand_of, describe, ensure_room
from d3etr.launch.task import Task, train
from d3etr.training.context import COLLECTIVE_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

ORDERLY_SECONDS = 10.0
"""After a worker said why the run must end, the others get so long to end in order."""


@dataclass(frozen=True)
class RayLauncher:
    """Trains with Ray Train.

    Attributes:
        task: what each worker runs.
    """

    task: Task = train

    def __call__(self, launch: Launch) -> None:
        """Train until the end.

        Raises:
            UserError: the cluster has no room, cannot be reached, or a worker met a mistake.
            RunFailedError: workers kept failing.
        """
        cluster = launch.config.cluster
        if in_temporary_copy(launch.run_dir):
            logger.warning(
                "the run's folder %s is inside Ray's temporary copy of the working directory and "
                "will be removed with it: --set run.output=FOLDER on shared storage keeps it",
                launch.run_dir,
            )
        with connected(cluster, launch.stage):
            nodes = cluster_nodes()
            demand = demand_of(cluster, nodes)
            ensure_room(demand, nodes)
            launch.stage(f"starting {demand} ({describe(nodes)})")
            # A fresh folder each time: a torn snapshot of Ray's can never block a resume.
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            storage = launch.run_dir / "ray" / stamp
            storage.mkdir(parents=True)
            notes = Notes(storage)
            trainer = _trainer(launch, self.task, demand, storage, notes)
            _fit(trainer, cluster, demand, notes)


def _trainer(
    launch: Launch, task: Task, demand: Demand, storage: Path, notes: Notes
) -> ray.train.torch.TorchTrainer:
    cluster = launch.config.cluster
    gpu = demand.gpus > 0
    assignment = Assignment(
        task,
        launch.config,
        launch.run_dir,
        launch.token,
        notes,
        gpu,
        os.environ.get("OMP_NUM_THREADS"),
    )
    resources = {"CPU": demand.cpus} | ({"GPU": demand.gpus} if gpu else {})
    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"assignment": assignment},
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(COLLECTIVE_TIMEOUT_SECONDS)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=demand.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.maximum_failures,
                # Each is one start_timeout_seconds of waiting for room; Ray's own has no limit.
                controller_failure_limit=cluster.maximum_failures,
            ),
        ),
    )


def _fit(
    trainer: ray.train.torch.TorchTrainer, cluster: ClusterConfig, demand: Demand, notes: Notes
) -> None:
    """Run the trainer in a thread, so that a signal reaches this one and not Ray's handlers."""
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    try:
        while thread.is_alive() and notes.reason() is None:
            thread.join(0.3)
    except KeyboardInterrupt:
        # Where the connection to Ray outlives the run, workers must know not to start again.
        notes.end(Reason("failure", "interrupted"))
        raise
    reason = notes.reason()
    if reason is not None:
        thread.join(ORDERLY_SECONDS)
        raise _ended(reason)
    if failures:
        raise translate(failures[0], cluster, demand, notes) from failures[0]


def _ended(reason: Reason) -> Exception:
    if reason.kind == "mistake":
        return UserError(reason.text)
    return RunFailedError(f"a worker failed twice in the same way:\n{reason.text}")


def translate(
    failure: Exception, cluster: ClusterConfig, demand: Demand, notes: Notes
) -> Exception:
    """What a failure of Ray's means to the user.

    Args:
        failure: raised by ``fit``.
        cluster: what was asked for, and how long to wait for it.
        demand: the workers that were to start.
        notes: what workers wrote down.

    Returns:
        A UserError where a worker raised one or there was no room; else a RunFailedError with
        a worker's own traceback.
    """
    workers = getattr(failure, "worker_failures", {})
    for error in workers.values():
        mistake = _user_error(error)
        if mistake is not None:
            return UserError(str(mistake))
    if workers:
        return _worker_failure(workers, cluster, notes)
    cause = getattr(failure, "controller_failure", failure)
    if type(cause).__name__ in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"):
        return UserError(_no_room(cause, cluster, demand))
    return RunFailedError(f"Ray Train failed: {type(cause).__name__}: {cause}")


def _worker_failure(
    workers: Mapping[int, Exception], cluster: ClusterConfig, notes: Notes
) -> RunFailedError:
    """The failure of the first worker that left a traceback, else of the first."""
    texts = {rank: notes.failure(rank) for rank in sorted(workers)}
    rank = next((rank for rank, text in texts.items() if text), min(workers))
    return RunFailedError(
        f"worker {rank} failed once more than cluster.maximum_failures "
        f"({cluster.maximum_failures}) allows:\n{texts[rank] or workers[rank]}"
    )


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake at the bottom of an exception, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _no_room(cause: BaseException, cluster: ClusterConfig, demand: Demand) -> str:
    free = free_resources()
    return (
        f"{demand} did not start within {cluster.start_timeout_seconds:g} seconds "
        f"(cluster.start_timeout_seconds), tried {cluster.maximum_failures + 1} times. The "
        f"cluster has {describe(cluster_nodes())}, of which {free.cpus:g} CPUs and "
        f"{free.gpus:g} GPUs are free. Wait for other jobs to end, or ask for less.\n"
        f"Ray says: {str(cause).strip().partition(chr(10))[0]}"
    )
