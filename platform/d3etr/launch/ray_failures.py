"""What a failure of Ray's means to the user."""

from __future__ import annotations

import re

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.control_files import ControlFiles
from d3etr.launch.limits import explained
from d3etr.launch.ray_cluster import cluster_nodes, free_resources
from d3etr.launch.resources import Demand, describe

MISSING = re.compile(r"No module named '([\w.]+)'")
PLACE = re.compile(r"\bip=([\w.:]+)")
"""How Ray names the node that an exception comes from."""
NOT_STARTED = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")


def translate(
    failure: Exception, cluster: ClusterConfig, demand: Demand, control: ControlFiles
) -> Exception:
    """What a failure of Ray's means to the user.

    Args:
        failure: raised by ``fit``.
        cluster: what was asked for, and how long to wait for it.
        demand: the workers that were to start.
        control: what workers wrote down.

    Returns:
        A UserError where a worker raised one or there was no room; else a RunFailedError with
        a worker's own traceback.
    """
    workers: dict[int, Exception] = getattr(failure, "worker_failures", {})
    cause = getattr(failure, "controller_failure", failure)
    for error in [*workers.values(), cause]:
        known = user_error(error) or _missing_package(str(error)) or explained(error)
        if known is not None:
            return UserError(str(known))
    if workers:
        texts = {rank: control.failure(rank) for rank in sorted(workers)}
        rank = next((rank for rank, text in texts.items() if text), min(workers))
        return RunFailedError(
            f"worker {rank} failed once more than cluster.maximum_failures "
            f"({cluster.maximum_failures}) allows:\n{texts[rank] or workers[rank]}"
        )
    if type(cause).__name__ not in NOT_STARTED:
        return RunFailedError(f"Ray Train failed: {type(cause).__name__}: {cause}")
    free = free_resources()
    return UserError(
        f"{demand} did not start within {cluster.start_timeout_seconds:g} seconds "
        f"(cluster.start_timeout_seconds), tried {cluster.maximum_failures + 1} times. The "
        f"cluster has {describe(cluster_nodes())}, of which {free.cpus:g} CPUs and "
        f"{free.gpus:g} GPUs are free. Wait for other jobs to end, or ask for less.\n"
        f"Ray says: {str(cause).strip().partition(chr(10))[0]}"
    )


def _missing_package(text: str) -> str | None:
    """What to do about a node that cannot import d3etr, or what d3etr needs, to start a worker."""
    module = MISSING.search(text)
    # An import that fails later, in training, is the traceback's to explain.
    if module is None or not ("d3etr" in module[1] or "init_train_context" in text):
        return None
    # The node that called comes first in the text, the one that failed last.
    places = PLACE.findall(text, 0, module.start())
    where = f"the node {places[-1]}" if places else "a node of the cluster"
    return (
        f"{where} cannot import '{module[1]}': every node needs d3etr and what it needs. Install "
        "the same environment there (pip install, or the image), put the checkout on storage that "
        "all nodes share, or send it along: ray job submit --working-dir . -- python "
        "trainers/run.py ..."
    )


def user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake at the bottom of an exception, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
