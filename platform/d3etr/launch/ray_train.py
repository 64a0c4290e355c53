"""Train under Ray Train: one to many workers on one to many machines.

Ray starts the workers, notices lost ones and starts them again, where training is elastic as many
as there is room for. Checkpoints, metrics and their history are in the run's folder and not Ray's,
so that a run can change launchers.
"""

from __future__ import annotations

import math
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
from d3etr.launch.processes import Task, train
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.ray_failures import translate
from d3etr.launch.ray_worker import Assignment, work
from d3etr.launch.resources import Demand, Node, demand_of, describe, ensure_room, room

RESULT_SECONDS = 30.0
"""Once the run's result is there, Ray gets so long to end; it ends a driver without a head after
60."""
ORDERLY_SECONDS = 10.0
"""Once a worker has written why the run must end, the others get so long to end in order."""
POLL_SECONDS = 0.3


def ray_launcher(task: Task = train) -> Callable[[Launch], Callable[[], None]]:
    """A launcher that reaches a cluster with room, and trains there until the end.

    Args:
        task: what each worker runs.
    """

    def make_ready(launch: Launch) -> Callable[[], None]:
        cluster = launch.config.cluster
        launch.later.enter_context(connected(cluster, launch.on_progress))
        nodes = cluster_nodes()
        demand = demand_of(cluster, nodes)
        ensure_room(demand, nodes)
        # A fresh folder: a torn snapshot of Ray's can never block a resume.
        storage = RunFolder(launch.run_dir).ray / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        storage.mkdir(parents=True)
        return partial(_Workers(launch, task, demand, storage, ControlFiles(storage)).train, nodes)

    return make_ready


@dataclass(frozen=True)
class _Workers:
    """The workers of one launch.

    Attributes:
        launch: the run.
        task: what each worker runs.
        demand: what each worker needs.
        storage: Ray's folder.
        control: what workers write down for the driver.
    """

    launch: Launch
    task: Task
    demand: Demand
    storage: Path
    control: ControlFiles

    def train(self, nodes: list[Node]) -> None:
        """Start workers and wait until they end.

        Ray's trainer runs in a thread, so that a signal reaches this one and not Ray's handlers.

        Raises:
            UserError: a worker met a mistake, or there was no room for too long.
            RunFailedError: workers kept failing.
        """
        cluster, errors = self.launch.config.cluster, list[Exception]()
        self.launch.on_progress(f"starting {self.demand} ({describe(nodes)})")
        trainer = self._trainer()

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        try:
            self._wait(thread)
        except (KeyboardInterrupt, UserError):
            # Where the connection to Ray outlives the run, workers must know not to start again.
            self.control.end(Reason("failure", "interrupted"))
            raise
        reason = self.control.reason()
        if reason is not None:
            thread.join(ORDERLY_SECONDS)
            if reason.kind == "mistake":
                raise UserError(reason.text)
            raise RunFailedError(f"a worker failed twice in the same way:\n{reason.text}")
        if thread.is_alive():
            raise RunFailedError(
                f"no word from Ray for {RESULT_SECONDS:g} seconds after the last step"
            )
        if errors:
            raise translate(errors[0], cluster, self.demand, self.control) from errors[0]

    def _wait(self, thread: threading.Thread) -> None:
        """Return when the trainer has ended, must end, or has had its time after the result.

        Raises:
            UserError: an elastic run had too few machines for as long as any run waits for room;
                Ray itself would wait for ever.
        """
        cluster, summary = self.launch.config.cluster, RunFolder(self.launch.run_dir).summary
        patience = cluster.start_timeout_seconds * (cluster.maximum_failures + 1)
        finished, enough = math.inf, time.monotonic()
        while thread.is_alive() and self.control.reason() is None:
            now = time.monotonic()
            if summary.exists():
                finished = min(finished, now)
            if now > finished + RESULT_SECONDS:
                return
            if not self.demand.elastic or self._fitting() >= self.demand.least:
                enough = now
            if now > enough + patience:
                raise UserError(
                    f"the cluster has {describe(cluster_nodes())}: room for {self._fitting()} of "
                    f"at least {self.demand.least} workers (cluster.minimum_workers), since "
                    f"{patience:g} seconds (cluster.start_timeout_seconds times maximum_failures + "
                    "1). Bring machines back; the same command goes on with the run."
                )
            thread.join(POLL_SECONDS)

    def _fitting(self) -> int:
        return room(cluster_nodes(), self.demand.cpus, self.demand.gpus)

    def _trainer(self) -> ray.train.torch.TorchTrainer:
        launch, demand, gpu = self.launch, self.demand, self.demand.gpus > 0
        failures = launch.config.cluster.maximum_failures
        omp_threads = os.environ.get("OMP_NUM_THREADS")
        assignment = Assignment(
            self.task, launch.config, launch.run_dir, launch.token, self.control, gpu, omp_threads
        )
        return ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(
                backend="nccl" if gpu else "gloo", timeout_s=int(COLLECTIVE_TIMEOUT_SECONDS)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(demand.least, demand.workers) if demand.elastic else demand.workers,
                # Workers that train are left alone: growing would repeat steps.
                elastic_resize_monitor_interval_s=math.inf,
                use_gpu=gpu,
                resources_per_worker={"CPU": demand.cpus} | ({"GPU": demand.gpus} if gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="workers",
                storage_path=str(self.storage),
                failure_config=ray.train.FailureConfig(
                    max_failures=failures,
                    # Each is one start_timeout_seconds of waiting for room; Ray's own has no limit.
                    controller_failure_limit=failures,
                ),
            ),
        )
