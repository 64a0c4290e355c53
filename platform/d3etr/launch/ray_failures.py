"""What a failure of Ray's means to the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.control_files import ControlFiles, Reason
from d3etr.launch.ray_cluster import cluster_nodes, free_resources
from d3etr.launch.resources import Demand, describe

MISSING = re.compile(r"No module named '([\w.]+)'")
PLACE = re.compile(r"\bip=([\w.:]+)")
"""How Ray names the node that an exception comes from."""
LOW_ON_MEMORY = re.compile(r"running low on memory.*?was ([\d.]+ ?GB used / [\d.]+ ?GB)", re.S)
"""Ray's text where it killed a process before its machine ran out of memory."""
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
    workers = getattr(failure, "worker_failures", {})
    for error in workers.values():
        mistake = user_error(error)
        if mistake is not None:
            return UserError(str(mistake))
    cause = getattr(failure, "controller_failure", failure)
    errors = [*workers.values()] or [cause]
    known = _missing_package(errors) or _low_on_memory(errors)
    if known is not None:
        return UserError(known)
    if workers:
        return _worker_failure(workers, cluster, control)
    if not_started(failure):
        return UserError(no_room(cluster, demand, str(cause)))
    return RunFailedError(f"Ray Train failed: {type(cause).__name__}: {cause}")


def not_started(failure: Exception) -> bool:
    """Whether the workers did not start in time, or died while they started."""
    cause = getattr(failure, "controller_failure", failure)
    return type(cause).__name__ in NOT_STARTED


def ended(reason: Reason) -> Exception:
    """The exception for a reason that a worker gave."""
    if reason.kind == "mistake":
        return UserError(reason.text)
    return RunFailedError(f"a worker failed twice in the same way:\n{reason.text}")


def no_room(cluster: ClusterConfig, demand: Demand, reason: str) -> str:
    """Why the workers could not start, and what to do.

    Args:
        cluster: how long was waited for them.
        demand: the workers.
        reason: Ray's own words.
    """
    free = free_resources()
    return (
        f"{demand} did not start within {cluster.start_timeout_seconds:g} seconds "
        f"(cluster.start_timeout_seconds), tried {cluster.maximum_failures + 1} times. The "
        f"cluster has {describe(cluster_nodes())}, of which {free.cpus:g} CPUs and "
        f"{free.gpus:g} GPUs are free. Wait for other jobs to end, or ask for less.\n"
        f"Ray says: {reason.strip().partition(chr(10))[0]}"
    )


def _worker_failure(
    workers: Mapping[int, Exception], cluster: ClusterConfig, control: ControlFiles
) -> RunFailedError:
    """The failure of the first worker that left a traceback, else of the first."""
    texts = {rank: control.failure(rank) for rank in sorted(workers)}
    rank = next((rank for rank, text in texts.items() if text), min(workers))
    return RunFailedError(
        f"worker {rank} failed once more than cluster.maximum_failures "
        f"({cluster.maximum_failures}) allows:\n{texts[rank] or workers[rank]}"
    )


def _missing_package(errors: Iterable[object]) -> str | None:
    """What to do about a node that cannot import d3etr, or what d3etr needs, to start a worker."""
    for text in map(str, errors):
        module = MISSING.search(text)
        # An import that fails later, in training, is the traceback's to explain.
        if module is not None and ("d3etr" in module[1] or "init_train_context" in text):
            # The node that called comes first in the text, the one that failed last.
            places = PLACE.findall(text, 0, module.start())
            where = f"the node {places[-1]}" if places else "a node of the cluster"
            return (
                f"{where} cannot import '{module[1]}': every node needs d3etr and what it needs. "
                "Install the same environment there (pip install, or the image), put the checkout "
                "on storage that all nodes share, or send it along: ray job submit "
                "--working-dir . -- python trainers/run.py ..."
            )
    return None


def _low_on_memory(errors: Iterable[object]) -> str | None:
    """What to do when Ray killed workers whose machine had hardly any memory left."""
    for text in map(str, errors):
        found = LOW_ON_MEMORY.search(text)
        if found is not None:
            return (
                f"Ray killed workers because their machine had hardly any memory left "
                f"({found[1]}; other programs count too). A larger optimisation.accumulation makes "
                "each worker hold fewer images at once and changes no loss but for dropout; fewer "
                "data.workers or cluster.workers help too. With the last two, the run goes on from "
                "its last checkpoint"
            )
    return None


def user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake at the bottom of an exception, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
