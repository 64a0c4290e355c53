"""What every worker runs, and the launchers that need no Ray: this process, and torchrun's.

torchrun starts this program once per worker: rank 0 is the driver too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess, Torchrun, TrainContext
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Launch, Launcher
from d3etr.launch.limits import clear_limits
from d3etr.launch.resources import threads_for
from d3etr.logs import get_logger

if TYPE_CHECKING:
    from d3etr.engine.hooks import Hook

logger = get_logger(__name__)

Task = Callable[[Config, Path, TrainContext], dict[str, float]]
"""Trains a configuration in a run's folder as one worker; returns the final metrics."""


def train(
    config: Config, run_dir: Path, context: TrainContext, hooks: Sequence[Hook] = ()
) -> dict[str, float]:
    """The task of every real run; ``hooks`` are people's own code."""
    # Imported by the worker: the driver of a cluster needs no data or model code.
    from d3etr.engine.run import run_training

    with clear_limits():
        return run_training(config, run_dir, context, hooks)


def local_launcher(
    task: Task = train, context: Callable[[], TrainContext] = SingleProcess
) -> Launcher:
    """A launcher that trains in this process.

    Args:
        task: what it runs.
        context: makes what the task knows of the world around it.
    """

    def make_ready(launch: Launch) -> Callable[[], None]:
        def run() -> None:
            cluster, before = launch.config.cluster, torch.get_num_threads()
            if cluster.workers != 1:
                logger.warning(
                    "cluster.workers is %d, but the launcher 'local' trains in one process",
                    cluster.workers,
                )
            torch.set_num_threads(threads_for(cluster, 1, os.environ.get("OMP_NUM_THREADS")))
            try:
                task(launch.config, launch.run_dir, context())
            finally:
                torch.set_num_threads(before)

        return run

    return make_ready


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


def torchrun_launcher(task: Task = train) -> Launcher:
    """A launcher that trains as rank 0 of a torchrun group.

    Args:
        task: what each worker runs.
    """

    def make_ready(launch: Launch) -> Callable[[], None]:
        workers, wanted = _ensure_divisible(launch.config), launch.config.cluster.workers

        def run() -> None:
            if workers != wanted:
                logger.warning("cluster.workers is %d, but torchrun started %d", wanted, workers)
            launch.on_progress(f"waiting for {workers} workers")
            _work(launch.config, launch.run_dir, task)

        return run

    return make_ready


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
        _ensure_divisible(config)
        _work(absolute_paths(config), folder.path, task)


def _work(config: Config, run_dir: Path, task: Task) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads_for(config.cluster, here, os.environ.get("OMP_NUM_THREADS")))
    with Torchrun() as context:
        task(config, run_dir, context)


def _ensure_divisible(config: Config) -> int:
    """Refuse a batch that torchrun's workers cannot share; returns their number.

    Raises:
        UserError: naming the numbers.
    """
    workers, optimisation = int(os.environ["WORLD_SIZE"]), config.optimisation
    if optimisation.batch_size % config.micro_batches(workers):
        raise UserError(
            f"optimisation.batch_size {optimisation.batch_size} is not a multiple of torchrun's "
            f"{workers} workers x optimisation.accumulation {optimisation.accumulation}"
        )
    if problem := config.composition_problem(config.micro_batches(workers)):
        raise UserError(problem)
    return workers
