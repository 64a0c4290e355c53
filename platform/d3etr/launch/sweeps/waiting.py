"""An end to waiting: Ray Tune itself waits for ever for room that others use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch.ray_cluster import cluster_nodes, free_resources
from d3etr.launch.resources import Demand, describe


class Waiting:
    """Notices that no trial trains.

    Args:
        cluster: how long to wait for room.
        demand: of one trial.
        tell: takes a line for a person.
    """

    def __init__(self, cluster: ClusterConfig, demand: Demand, tell: Callable[[str], None]) -> None:
        self._patience = cluster.start_timeout_seconds
        self._limit = self._patience * (cluster.maximum_failures + 1)
        self._demand, self._tell = demand, tell
        self._since = time.monotonic()
        self._told = False

    def look(self, statuses: Iterable[str]) -> None:
        """Take the trials' states; called again and again.

        Raises:
            UserError: trials have waited for as long as a run would, and none trains.
        """
        states = set(statuses)
        if "RUNNING" in states or "PENDING" not in states:
            self._since, self._told = time.monotonic(), False
            return
        waited = time.monotonic() - self._since
        if waited > self._limit:
            raise UserError(
                f"{self._lack()}, since {self._limit:g} seconds (cluster.start_timeout_seconds "
                "times maximum_failures + 1). Wait for other jobs to end; the same command goes "
                "on with the sweep."
            )
        if waited > self._patience and not self._told:
            self._told = True
            self._tell(f"{self._lack()}; waiting for other jobs")

    def _lack(self) -> str:
        free = free_resources()
        return (
            f"no room for a trial ({self._demand}): the cluster has {describe(cluster_nodes())}, "
            f"of which {free.cpus:g} CPUs and {free.gpus:g} GPUs are free"
        )
