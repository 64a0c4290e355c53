"""Train under torchrun, which starts this program once per worker: rank 0 is the driver too."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from d3etr.config.tree import Config
from d3etr.engine.distributed import Torchrun
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Launch
from d3etr.launch.resources import threads_for
from d3etr.launch.task import Task, train
from d3etr.logs import get_logger

logger = get_logger(__name__)


def torchrun_rank() -> int:
    """This process's rank.

    Raises:
        UserError: torchrun did not start this process.
    """
    rank = os.environ.get("RANK")
    if rank is None or "WORLD_SIZE" not in os.environ:
        raise UserError(
            "the launcher 'torchrun' expects to be started by it: torchrun --nproc-per-node N "
            "trainers/run.py RECIPE --launcher torchrun"
        )
    return int(rank)


@dataclass(frozen=True)
class TorchrunLauncher:
    """Trains as rank 0 of a torchrun group.

    Attributes:
        task: what each worker runs.
    """

    task: Task = train

    def __call__(self, launch: Launch) -> Callable[[], None]:
        """Refuse what this number of workers cannot train."""
        ensure_divisible(launch.config, int(os.environ["WORLD_SIZE"]))
        return partial(self._train, launch)

    def _train(self, launch: Launch) -> None:
        workers = int(os.environ["WORLD_SIZE"])
        if workers != launch.config.cluster.workers:
            logger.warning(
                "cluster.workers is %d, but torchrun started %d",
                launch.config.cluster.workers,
                workers,
            )
        if launch.config.cluster.minimum_workers is not None:
            logger.warning(
                "cluster.minimum_workers has no effect: elastic training needs the launcher 'ray'"
            )
        launch.on_progress(f"waiting for {workers} workers")
        _work(launch.config, RunFolder(launch.run_dir), self.task)


def join_rank_0(config: Config, folder: RunFolder, task: Task = train) -> None:
    """Be a worker other than rank 0: no lock, no tracking, nothing on the screen.

    Waits in the group's rendezvous until rank 0 holds the run's folder. A run that is finished
    has nothing to wait for.

    Args:
        config: the configuration.
        folder: the run's folder.
        task: what to run.
    """
    if folder.result() is None:
        _work(absolute_paths(config), folder, task)


def _work(config: Config, folder: RunFolder, task: Task) -> None:
    ensure_divisible(config, int(os.environ["WORLD_SIZE"]))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads_for(config.cluster, here, os.environ.get("OMP_NUM_THREADS")))
    with Torchrun() as context:
        task(config, folder.path, context)


def ensure_divisible(config: Config, workers: int) -> None:
    """Refuse a batch that this number of workers cannot share.

    Raises:
        UserError: naming the numbers.
    """
    optimisation = config.optimisation
    if optimisation.batch_size % config.micro_batches(workers):
        raise UserError(
            f"optimisation.batch_size {optimisation.batch_size} is not a multiple of torchrun's "
            f"{workers} workers x optimisation.accumulation {optimisation.accumulation}"
        )
