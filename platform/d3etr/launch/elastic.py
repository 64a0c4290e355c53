"""Elastic training: go on with the machines that are left, grow back when there are more.

Each number of workers is a group of its own, which begins at the newest checkpoint. The driver
chooses the number, rather than Ray's own elastic policy: that one waits for ever below the
minimum, starts by resources that may be gone (Ray misses a lost machine after some 15 seconds),
and grows at once, throwing away what was trained since the checkpoint. Here workers leave for a
larger group right after a checkpoint, so growing repeats no step.
"""

from __future__ import annotations

import time

from d3etr.errors import RunFailedError, UserError
from d3etr.launch.ray_cluster import answering_nodes, free_resources
from d3etr.launch.ray_failures import not_started, translate
from d3etr.launch.ray_group import Group
from d3etr.launch.resources import Demand, describe, room

LOOK_SECONDS = 2.0
"""Between two looks for more room, while there are fewer workers than wanted."""
WAIT_SECONDS = 1.0


def train_elastically(group: Group) -> None:
    """Train until the end with between ``cluster.minimum_workers`` and ``workers`` workers.

    Args:
        group: what all groups of workers have in common.

    Raises:
        UserError: a worker met a mistake, or there was no room for the least number of workers
            for longer than configured.
        RunFailedError: workers kept failing.
    """
    _Elastic(group).run()


class _Elastic:
    """The groups of one launch, one after the other."""

    def __init__(self, group: Group) -> None:
        self._group, self._demand = group, group.demand
        self._cluster = group.launch.config.cluster
        self._failures = 0
        self._most = group.demand.workers
        """Less than wanted after so many did not start, though there seemed to be room."""
        self._patience = 0.0

    def run(self) -> None:
        control, groups = self._group.control, 0
        while True:
            workers = min(self._most, self._wait_for_room())
            self._group.launch.on_progress(f"starting {workers} of {self._demand.workers} workers")
            control.regroup_request.unlink(missing_ok=True)
            control.regroup_reply.unlink(missing_ok=True)
            groups += 1
            growth = _Growth(self._group, workers, self._patience)
            try:
                self._group.fit(workers, 0, f"workers-{groups}", growth.look)
            except (UserError, RunFailedError):
                raise
            except Exception as error:
                self._survive(error, workers)
                continue
            if not control.regroup_reply.exists():
                return
            self._most, self._patience = self._demand.workers, 0.0

    def _wait_for_room(self) -> int:
        """How many workers fit on the machines that answer, at least the minimum."""
        cluster, demand = self._cluster, self._demand
        seconds = cluster.start_timeout_seconds * (cluster.maximum_failures + 1)
        deadline, told = time.monotonic() + seconds, False
        while True:
            nodes = answering_nodes()
            fitting = room(nodes, demand.cpus, demand.gpus)
            if fitting >= demand.least:
                return fitting
            text = (
                f"the cluster has {describe(nodes)}: room for {fitting} of at least "
                f"{demand.least} workers (cluster.minimum_workers)"
            )
            if time.monotonic() > deadline:
                raise UserError(
                    f"{text}, since {seconds:g} seconds (cluster.start_timeout_seconds times "
                    "maximum_failures + 1). Bring machines back; the same command goes on with "
                    "the run."
                )
            if not told:
                self._group.launch.on_progress(f"{text}; waiting for machines")
            told = True
            time.sleep(WAIT_SECONDS)

    def _survive(self, error: Exception, workers: int) -> None:
        """Prepare the next group, or raise if there must be none."""
        on_progress = self._group.launch.on_progress
        if not_started(error) and workers > self._demand.least:
            # Others use what seemed free. Not soon again.
            self._most, self._patience = workers - 1, self._cluster.start_timeout_seconds
            on_progress(f"{workers} workers did not start; trying {workers - 1}")
            return
        answer = translate(error, self._cluster, self._demand, self._group.control)
        self._failures += 1
        mistake = isinstance(answer, UserError) and not not_started(error)
        if mistake or self._failures > self._cluster.maximum_failures:
            raise answer from error
        on_progress(
            f"lost one or more of {workers} workers (loss {self._failures} of at most "
            f"{self._cluster.maximum_failures}); going on with what is left"
        )


class _Growth:
    """Looks for room for more workers while a group trains.

    Args:
        group: what all groups have in common.
        workers: in this group.
        patience: seconds before the first look.
    """

    def __init__(self, group: Group, workers: int, patience: float) -> None:
        self._group, self._workers = group, workers
        self._next = time.monotonic() + patience
        self._before = workers
        self._asked = False

    def look(self) -> None:
        """Ask the workers to leave at the next checkpoint, if more would fit."""
        if self._workers == self._group.demand.workers or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        possible = _possible(self._group.demand, self._workers)
        # Seen twice: a machine that just joined or left may be counted half.
        more = min(possible, self._before) > self._workers
        self._before = possible
        if more and not self._asked:
            self._asked = True
            self._group.control.regroup_request.touch()
            self._group.launch.on_progress(
                f"there is room for {possible} workers: they start at the next checkpoint"
            )


def _possible(demand: Demand, workers: int) -> int:
    """Workers that fit where ``workers`` of them run already and others may use the rest."""
    fitting = room(answering_nodes(), demand.cpus, demand.gpus)
    more = room([free_resources()], demand.cpus, demand.gpus)
    return min(demand.workers, fitting, workers + more)
