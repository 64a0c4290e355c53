"""Train under Ray Train: one to many workers on one to many machines.

Ray starts the workers and notices lost ones. Checkpoints, metrics and their history are in the
run's folder and not Ray's, so that a run can change launchers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import ray.train
import ray.train.torch

from d3etr.engine.distributed import COLLECTIVE_TIMEOUT_SECONDS
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.control_files import ControlFiles, Reason
from d3etr.launch.driver import Launch
from d3etr.launch.process_group import TorchConfig
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.ray_failures import ended, translate
from d3etr.launch.ray_worker import Assignment, work
from d3etr.launch.resources import Demand, demand_of, describe, ensure_room
from d3etr.launch.task import Task, train

RESULT_SECONDS = 30.0
"""Once the run's result is there, Ray gets so long to end; it ends a driver without a head after
60."""
ORDERLY_SECONDS = 10.0
"""Once a worker has written why the run must end, the others get so long to end in order."""
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class RayLauncher:
    """Trains with Ray Train.

    Attributes:
        task: what each worker runs.
    """

    task: Task = train

    def __call__(self, launch: Launch) -> Callable[[], None]:
        """Reach a cluster that has room, and return what trains there until the end.

        Raises:
            UserError: the cluster has no room, or cannot be reached.
        """
        from d3etr.launch.elastic import train_elastically

        cluster = launch.config.cluster
        launch.later.enter_context(connected(cluster, launch.on_progress))
        nodes = cluster_nodes()
        demand = demand_of(cluster, nodes)
        ensure_room(demand, nodes)
        storage = RunFolder(launch.run_dir).ray / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        storage.mkdir(parents=True)
        group = WorkerGroup(launch, self.task, demand, storage, ControlFiles(storage))
        if demand.elastic:
            return partial(train_elastically, group)
        return partial(_train, group, describe(nodes))


def _train(group: WorkerGroup, nodes: str) -> None:
    """Train with as many workers as asked for; Ray starts them again where some are lost.

    Raises:
        UserError: a worker met a mistake.
        RunFailedError: workers kept failing.
    """
    cluster = group.launch.config.cluster
    group.launch.on_progress(f"starting {group.demand} ({nodes})")
    try:
        group.fit(group.demand.workers, cluster.maximum_failures, "workers")
    except (UserError, RunFailedError):
        raise
    except Exception as error:
        raise translate(error, cluster, group.demand, group.control) from error


@dataclass(frozen=True)
class WorkerGroup:
    """Starts workers of one launch, watches them, and waits for their end.

    Attributes:
        launch: the run.
        task: what each worker runs.
        demand: what each worker needs.
        storage: Ray's folder.
        control: how workers and driver control each other.
    """

    launch: Launch
    task: Task
    demand: Demand
    storage: Path
    control: ControlFiles

    def fit(
        self, workers: int, failures: int, name: str, watch: Callable[[], None] = lambda: None
    ) -> None:
        """Start ``workers`` and wait until they end.

        Ray's trainer runs in a thread, so that a signal reaches this one and not Ray's handlers.

        Args:
            workers: how many.
            failures: how often Ray may start them again.
            name: of Ray's own folder in ``storage``: a fresh one for each group, so that a torn
                snapshot of Ray's can never block a resume.
            watch: called several times a second, meanwhile.

        Raises:
            UserError: a worker met a mistake.
            RunFailedError: a worker failed twice in the same way.
            Exception: Ray's own, of any other failure.
        """
        trainer, errors = self._trainer(workers, failures, name), list[Exception]()

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        try:
            self._wait(thread, watch)
        except KeyboardInterrupt:
            # Where the connection to Ray outlives the run, workers must know not to start again.
            self.control.end(Reason("failure", "interrupted"))
            raise
        reason = self.control.reason()
        if reason is not None:
            thread.join(ORDERLY_SECONDS)
            raise ended(reason)
        if thread.is_alive():
            raise RunFailedError(
                f"no word from Ray for {RESULT_SECONDS:g} seconds after the last step"
            )
        if errors:
            raise errors[0]

    def _wait(self, thread: threading.Thread, watch: Callable[[], None]) -> None:
        """Return when the trainer has ended, must end, or has had its time after the result."""
        summary = RunFolder(self.launch.run_dir).summary
        finished: float | None = None
        while thread.is_alive() and self.control.reason() is None:
            if finished is None and summary.exists():
                finished = time.monotonic()
            if finished is not None and time.monotonic() > finished + RESULT_SECONDS:
                return
            watch()
            thread.join(POLL_SECONDS)

    def _trainer(self, workers: int, failures: int, name: str) -> ray.train.torch.TorchTrainer:
        gpu = self.demand.gpus > 0
        assignment = Assignment(
            self.task,
            self.launch.config,
            self.launch.run_dir,
            self.launch.token,
            self.control,
            gpu,
            os.environ.get("OMP_NUM_THREADS"),
        )
        resources = {"CPU": self.demand.cpus} | ({"GPU": self.demand.gpus} if gpu else {})
        return ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(
                backend="nccl" if gpu else "gloo", timeout_s=int(COLLECTIVE_TIMEOUT_SECONDS)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(self.storage),
                failure_config=ray.train.FailureConfig(
                    max_failures=failures,
                    # Each is one start_timeout_seconds of waiting for room; Ray's own has no limit.
                    controller_failure_limit=failures,
                ),
            ),
        )
