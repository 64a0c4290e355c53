"""A function on one worker of the cluster, with what a training worker has there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import RunFailedError
from d3etr.launch.limits import clear_limits
from d3etr.launch.ray_cluster import cluster_nodes
from d3etr.launch.ray_failures import user_error
from d3etr.launch.resources import demand_of, ensure_room, threads_for

Answer = TypeVar("Answer")


def on_a_worker(cluster: ClusterConfig, work: Callable[..., Answer], *arguments: Any) -> Answer:
    """Run a function in a process of its own with the cores and the GPU of a training worker.

    Ray has to be connected. A lost process is tried again ``cluster.maximum_failures`` times.

    Args:
        cluster: what a worker is.
        work: a function that can be imported; what it is given and returns can be pickled.
        *arguments: of the function.

    Raises:
        UserError: what the function raised as one, or there is no room.
        RunFailedError: anything else that it raised.
    """
    nodes = cluster_nodes()
    demand = demand_of(cluster, nodes)
    ensure_room(demand, nodes)
    options = {"num_cpus": demand.cpus, "num_gpus": demand.gpus}
    task = ray.remote(_work).options(max_retries=cluster.maximum_failures, **options)
    try:
        answer: Answer = ray.get(task.remote(cluster, work, arguments))
    except RayError as error:
        raise user_error(error) or RunFailedError(str(error)) from None
    return answer


def _work(
    cluster: ClusterConfig, work: Callable[..., Answer], arguments: tuple[Any, ...]
) -> Answer:
    torch.set_num_threads(threads_for(cluster, 1, os.environ.get("OMP_NUM_THREADS")))
    with clear_limits():
        return work(*arguments)
