"""Does a cluster have room for the workers that a run asks for? Answered before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Demand:
    """Workers, and what each needs on one machine.

    Attributes:
        workers: how many.
        cpus: for each.
        gpus: for each.
        minimum: train also with fewer workers, at least so many; None: never.
    """

    workers: int
    cpus: float
    gpus: float
    minimum: int | None = None

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.minimum is not None

    @property
    def least(self) -> int:
        """So many workers must fit."""
        return self.workers if self.minimum is None else self.minimum

    def __str__(self) -> str:
        each = _amount(self.cpus, "CPU") + (
            f" and {_amount(self.gpus, 'GPU')}" if self.gpus else ""
        )
        several = self.workers > 1
        count = f"{self.minimum} to {self.workers} workers" if self.elastic and several else ""
        return f"{count or _amount(self.workers, 'worker')} with {each}" + " each" * several


def room(nodes: Sequence[Node], cpus: float, gpus: float) -> int:
    """How many workers fit into ``nodes`` if each needs so many CPUs and GPUs on one node."""
    slack = 1e-6  # three workers of a third of a GPU fit on one
    return sum(
        int(min(node.cpus / cpus, node.gpus / gpus if gpus else float("inf")) + slack)
        for node in nodes
    )


def demand_of(cluster: ClusterConfig, nodes: Sequence[Node]) -> Demand:
    """What a configuration asks for on this cluster: settles ``gpus_per_worker: auto``."""
    gpus, least = cluster.gpus_per_worker, cluster.minimum_workers or cluster.workers
    if gpus == "auto":
        present = sum(node.gpus for node in nodes)
        gpus = 1.0 if room(nodes, cluster.cpus_per_worker, 1.0) >= least else 0.0
        if present and not gpus:
            logger.warning(
                "training on CPUs: the cluster has %s, not one for each of %d workers. "
                "Set cluster.workers or cluster.gpus_per_worker to use them.",
                describe(nodes),
                least,
            )
    return Demand(cluster.workers, cluster.cpus_per_worker, float(gpus), cluster.minimum_workers)


def ensure_room(demand: Demand, nodes: Sequence[Node]) -> None:
    """Refuse a demand that the cluster can never meet.

    Raises:
        UserError: saying what is there and what to change.
    """
    fitting = room(nodes, demand.cpus, demand.gpus)
    if fitting >= demand.least:
        return
    key = "minimum_workers" if demand.elastic else "workers"
    change = f"--set cluster.{key}={fitting}, or ask for less" if fitting else "Ask for less"
    raise UserError(
        f"the cluster has {describe(nodes)}: {demand} do not fit, there is room for "
        f"{fitting or 'none'}.\n{change} per worker (cluster.cpus_per_worker, "
        "cluster.gpus_per_worker), or add machines to the cluster."
    )


def this_machine() -> Node:
    """What Ray would find here; starts nothing."""
    from ray._private.accelerators import get_all_accelerator_managers
    from ray._private.utils import get_num_cpus

    managers = get_all_accelerator_managers()
    gpus = [one for one in managers if one.get_resource_name() == "GPU"]
    return Node(get_num_cpus(), sum(one.get_current_node_num_accelerators() for one in gpus))


def describe(nodes: Sequence[Node]) -> str:
    """The nodes in words."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{_amount(cpus, 'CPU')} and {_amount(gpus, 'GPU')} on {_amount(len(nodes), 'node')}"


def threads_for(cluster: ClusterConfig, workers_here: int, omp_threads: str | None) -> int:
    """Threads of tensor operations for one worker.

    Args:
        cluster: the configuration.
        workers_here: workers on this machine.
        omp_threads: the driver's OMP_NUM_THREADS, which ``auto`` respects.
    """
    if cluster.threads_per_worker != "auto":
        return cluster.threads_per_worker
    if omp_threads is not None and omp_threads.isdigit() and int(omp_threads) > 0:
        return int(omp_threads)
    return max(1, usable_cores() // workers_here)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _amount(count: float, noun: str) -> str:
    return f"{count:g} {noun}" + "s" * (count != 1)
