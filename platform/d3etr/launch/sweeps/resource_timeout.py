"""Ends a sweep that waits in vain: Ray Tune itself waits for ever for room that others use."""

from __future__ import annotations

import time
from collections.abc import Iterable

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch.ray_cluster import cluster_nodes, free_resources
from d3etr.launch.resources import Demand, describe
from d3etr.progress import OnProgress


class ResourceTimeout:
    """Notices that trials wait and none trains.

    Args:
        cluster: how long to wait for room.
        demand: of one trial.
        on_progress: takes lines for a person.
    """

    def __init__(self, cluster: ClusterConfig, demand: Demand, on_progress: OnProgress) -> None:
        self._notice = cluster.start_timeout_seconds
        self._limit = self._notice * (cluster.maximum_failures + 1)
        self._demand, self._on_progress = demand, on_progress
        self._since, self._noticed = time.monotonic(), False

    def check(self, statuses: Iterable[str]) -> None:
        """Take the trials' states; called again and again.

        Raises:
            UserError: trials have waited for as long as a run would, and none trains.
        """
        states = set(statuses)
        if "RUNNING" in states or "PENDING" not in states:
            self._since, self._noticed = time.monotonic(), False
            return
        waited = time.monotonic() - self._since
        if waited > self._limit:
            raise UserError(
                f"{self._lack()}, since {self._limit:g} seconds (cluster.start_timeout_seconds "
                "times maximum_failures + 1). Wait for other jobs to end; the same command goes "
                "on with the sweep."
            )
        if waited > self._notice and not self._noticed:
            self._noticed = True
            self._on_progress(f"{self._lack()}; waiting for other jobs")

    def _lack(self) -> str:
        free = free_resources()
        return (
            f"no room for a trial ({self._demand}): the cluster has {describe(cluster_nodes())}, "
            f"of which {free.cpus:g} CPUs and {free.gpus:g} GPUs are free"
        )
