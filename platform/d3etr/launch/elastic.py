"""Elastic training: go on with the machines that are left, grow back when there are more.

Each number of workers is a group of its own, which begins at the newest checkpoint. The driver
chooses the number, rather than Ray's own elastic policy (2.60): that one waits for ever below the
minimum, starts by resources that may be gone (Ray misses a lost machine after some 15 seconds),
and grows at once, throwing away what was trained since the checkpoint. Here workers leave for a
larger group right after a checkpoint, so growing repeats no step.
"""

from __future__ import annotations

import time

from d3etr.errors import RunFailedError, UserError
from d3etr.launch.ray_cluster import answering_nodes, free_resources
from d3etr.launch.ray_failures import not_started, translate
from d3etr.launch.ray_train import WorkerGroup
from d3etr.launch.resources import describe, room

LOOK_SECONDS = 2.0
"""Between two looks for more room, while there are fewer workers than wanted."""
WAIT_SECONDS = 1.0


def train_elastically(group: WorkerGroup) -> None:
    """Train until the end with between ``cluster.minimum_workers`` and ``workers`` workers.

    Args:
        group: starts workers.

    Raises:
        UserError: a worker met a mistake, or there was no room for the least number of workers
            for longer than configured.
        RunFailedError: workers kept failing.
    """
    failures, groups = 0, 0
    most, first_look = group.demand.workers, 0.0
    while True:
        workers = min(most, _wait_for_room(group))
        group.launch.on_progress(f"starting {workers} of {group.demand.workers} workers")
        for file in (group.control.regroup_request, group.control.regroup_reply):
            file.unlink(missing_ok=True)
        groups += 1
        growth = _Growth(group, workers, first_look)
        try:
            group.fit(workers, 0, f"workers-{groups}", growth.look)
        except (UserError, RunFailedError):
            raise
        except Exception as error:
            if not_started(error) and workers > group.demand.least:
                # Others use what seemed free. Not soon again.
                most, first_look = workers - 1, group.launch.config.cluster.start_timeout_seconds
                group.launch.on_progress(f"{workers} workers did not start; trying {most}")
                continue
            failures += 1
            _survive(group, error, workers, failures)
            continue
        if not group.control.regroup_reply.exists():
            return
        most, first_look = group.demand.workers, 0.0


def _wait_for_room(group: WorkerGroup) -> int:
    """How many workers fit on the machines that answer, at least the minimum."""
    cluster, demand = group.launch.config.cluster, group.demand
    seconds = cluster.start_timeout_seconds * (cluster.maximum_failures + 1)
    deadline, reported = time.monotonic() + seconds, False
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
        if not reported:
            group.launch.on_progress(f"{text}; waiting for machines")
        reported = True
        time.sleep(WAIT_SECONDS)


def _survive(group: WorkerGroup, error: Exception, workers: int, failures: int) -> None:
    """Report a loss of workers, or raise if there must be no other group."""
    cluster = group.launch.config.cluster
    answer = translate(error, cluster, group.demand, group.control)
    mistake = isinstance(answer, UserError) and not not_started(error)
    if mistake or failures > cluster.maximum_failures:
        raise answer from error
    group.launch.on_progress(
        f"lost one or more of {workers} workers (loss {failures} of at most "
        f"{cluster.maximum_failures}); going on with what is left"
    )


class _Growth:
    """Looks for room for more workers while some train.

    Args:
        group: starts workers.
        workers: how many train.
        first_look: seconds until the first look.
    """

    def __init__(self, group: WorkerGroup, workers: int, first_look: float) -> None:
        self._group, self._workers = group, workers
        self._next = time.monotonic() + first_look
        self._before = workers

    def look(self) -> None:
        """Ask the workers to leave at the next checkpoint, if more would fit."""
        if self._workers == self._group.demand.workers or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        possible = self._possible()
        # Seen twice: a machine that just joined or left may be counted half.
        more = min(possible, self._before) > self._workers
        self._before = possible
        if more and not self._group.control.regroup_request.exists():
            self._group.control.regroup_request.touch()
            self._group.launch.on_progress(
                f"there is room for {possible} workers: they start at the next checkpoint"
            )

    def _possible(self) -> int:
        """Workers that fit, where ours run already and others may use the rest."""
        demand = self._group.demand
        fitting = room(answering_nodes(), demand.cpus, demand.gpus)
        more = room([free_resources()], demand.cpus, demand.gpus)
        return min(demand.workers, fitting, self._workers + more)
