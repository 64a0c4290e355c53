"""One group of Ray Train workers: started, watched, and waited for until it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import RunFailedError
from d3etr.launch.control_files import ControlFiles, Reason
from d3etr.launch.driver import Launch
from d3etr.launch.process_group import TorchConfig
from d3etr.launch.ray_failures import ended
from d3etr.launch.ray_worker import Assignment, work
from d3etr.launch.resources import Demand
from d3etr.launch.task import Task
from d3etr.training.context import COLLECTIVE_TIMEOUT_SECONDS

ENDING_SECONDS = 30.0
"""Once the run's result is there, Ray gets so long to say so; it ends a driver without a head
after 60."""
ORDERLY_SECONDS = 10.0
"""After a worker said why the run must end, the others get so long to end in order."""
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Group:
    """What all groups of workers of one launch have in common.

    Attributes:
        launch: the run.
        task: what each worker runs.
        demand: what each worker needs.
        storage: Ray's folder.
        control: what workers and driver tell each other.
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
        ending = _Ending(RunFolder(self.launch.run_dir))
        _fit(self._trainer(workers, failures, name), self.control, watch, ending)

    def _trainer(self, workers: int, failures: int, name: str) -> ray.train.torch.TorchTrainer:
        gpu = self.demand.gpus > 0
        resources = {"CPU": self.demand.cpus} | ({"GPU": self.demand.gpus} if gpu else {})
        return ray.train.torch.TorchTrainer(
            work,
            train_loop_config={"assignment": self._assignment()},
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

    def _assignment(self) -> Assignment:
        return Assignment(
            self.task,
            self.launch.config,
            self.launch.run_dir,
            self.launch.token,
            self.control,
            self.demand.gpus > 0,
            os.environ.get("OMP_NUM_THREADS"),
        )


class _Ending:
    """Whether Ray is not worth waiting for any more.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._seen: float | None = None

    def overdue(self) -> bool:
        """Whether the run's result has been there for longer than ``ENDING_SECONDS``."""
        if self._seen is None and self._folder.summary.exists():
            self._seen = time.monotonic()
        return self._seen is not None and time.monotonic() > self._seen + ENDING_SECONDS


def _fit(
    trainer: ray.train.torch.TorchTrainer,
    control: ControlFiles,
    watch: Callable[[], None],
    ending: _Ending,
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
        while thread.is_alive() and control.reason() is None and not ending.overdue():
            watch()
            thread.join(POLL_SECONDS)
    except KeyboardInterrupt:
        # Where the connection to Ray outlives the run, workers must know not to start again.
        control.end(Reason("failure", "interrupted"))
        raise
    reason = control.reason()
    if reason is not None:
        thread.join(ORDERLY_SECONDS)
        raise ended(reason)
    if thread.is_alive():
        raise RunFailedError(f"no word from Ray for {ENDING_SECONDS:g} seconds after the last step")
    if failures:
        raise failures[0]
