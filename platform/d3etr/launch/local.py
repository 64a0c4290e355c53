"""Train in the driver's own process: no cluster, one worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from d3etr.engine.distributed import SingleProcess, TrainContext
from d3etr.launch.driver import Launch
from d3etr.launch.resources import threads_for
from d3etr.launch.task import Task, train
from d3etr.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class LocalLauncher:
    """Trains in this process.

    Attributes:
        task: what it runs.
        context: makes what the task knows of the world around it.
    """

    task: Task = train
    context: Callable[[], TrainContext] = SingleProcess

    def __call__(self, launch: Launch) -> Callable[[], None]:
        """Nothing is to be made ready."""
        return partial(self._train, launch)

    def _train(self, launch: Launch) -> None:
        cluster = launch.config.cluster
        if cluster.workers != 1:
            logger.warning(
                "cluster.workers is %d, but the launcher 'local' trains in one process",
                cluster.workers,
            )
        if cluster.minimum_workers is not None:
            logger.warning(
                "cluster.minimum_workers has no effect: elastic training needs the launcher 'ray'"
            )
        before = torch.get_num_threads()
        torch.set_num_threads(threads_for(cluster, 1, os.environ.get("OMP_NUM_THREADS")))
        try:
            self.task(launch.config, launch.run_dir, self.context())
        finally:
            torch.set_num_threads(before)
