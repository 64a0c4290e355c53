"""Join a Ray cluster, or start one here, and leave it as it was found."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch.ending import NoAnswerError, at_the_end, attempt, attempt_within
from d3etr.launch.environment import (
    environment,
    package_environment,
    ray_settings,
    runtime_environment,
)
from d3etr.launch.leftovers import end_with_this_process
from d3etr.launch.resources import Node
from d3etr.launch.signals import handler_kept, terminable
from d3etr.logs import get_logger

logger = get_logger(__name__)

CONNECT_SECONDS = 60.0
"""ray.init has no limit of its own: it waits for ever for a cluster that is half reachable."""
LEAVE_SECONDS = 30.0
"""Where the head is gone, Ray leaves after some 15 seconds."""
PROBE_SECONDS = 10.0
ANSWER_SECONDS = 2.0
NO_PREEMPTION = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""A cluster of one's own loses no node to others: one process less to start."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Training passes nothing through Ray's object store."""


@contextmanager
def connected(cluster: ClusterConfig, stage: Callable[[str], None]) -> Iterator[None]:
    """A Ray connection for the block.

    An existing connection is used and left open. Else ``cluster.address``, the cluster of the
    submitted job that this is (``RAY_ADDRESS``), or a cluster started here that ends with the
    block. A command's process stays connected until its end, unless the block raised: workers
    must be gone before others may have the run's folder.

    Raises:
        UserError: the cluster does not answer or refuses.
    """
    with ExitStack() as stack:
        stack.enter_context(environment(ray_settings(cluster)))
        if not ray.is_initialized():
            address = joined_address(cluster) or "local"
            if address == "local":
                stack.enter_context(environment(package_environment(), override=True))
                stack.enter_context(environment(NO_PREEMPTION))
            stack.push(_leave)
            stage("starting Ray" if address == "local" else f"joining the Ray cluster at {address}")
            with handler_kept():
                _connect(address)
        stack.enter_context(terminable())
        yield


def _leave(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    """Disconnect, which ends a cluster that was started here; that it fails costs nothing.

    Ray's processes must not end while this one is connected: it would be ended with code 1.
    """
    if error is None and at_the_end(end_with_this_process):
        return
    if error is not None and isinstance(error.__cause__, NoAnswerError):
        return  # a thread waits inside of Ray
    failure = attempt_within(LEAVE_SECONDS, ray.shutdown)
    if failure is not None:
        logger.warning("Ray did not end in order: %r", failure)


def joined_address(cluster: ClusterConfig) -> str | None:
    """The running cluster that a run joins; None where it starts one of its own."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or None


def cluster_nodes() -> list[Node]:
    """The machines of the connected cluster; Ray takes some 15 seconds to miss a lost one."""
    return [_offer(node) for node in ray.nodes() if node["Alive"]]


def answering_nodes() -> list[Node]:
    """Those machines of the connected cluster that answer at this moment."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=max(1, len(alive))) as pool:
        answers = list(pool.map(_answers, alive))
    return [_offer(node) for node, answer in zip(alive, answers, strict=True) if answer]


def _offer(node: Mapping[str, Any]) -> Node:
    total = node["Resources"]
    return Node(total.get("CPU", 0.0), total.get("GPU", 0.0))


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether the node's Ray process takes connections."""
    place = (node["NodeManagerAddress"], int(node["NodeManagerPort"]))
    return attempt(lambda: socket.create_connection(place, ANSWER_SECONDS).close()) is None


def free_resources() -> Node:
    """What nobody uses at the moment, over the whole cluster."""
    free = ray.available_resources()
    return Node(free.get("CPU", 0.0), free.get("GPU", 0.0))


def _connect(address: str) -> None:
    failure: Exception | None
    options: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address == "local":
        # In this thread: Ray's processes end with the thread that started them.
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        failure = attempt(partial(ray.init, **options))
    elif (failure := _probe(address)) is None:
        join = partial(ray.init, **options, runtime_env=runtime_environment())
        failure = attempt_within(CONNECT_SECONDS, join)
    if failure is not None:
        raise UserError(_explanation(address, failure)) from failure


def _probe(address: str) -> Exception | None:
    """Whether anything listens at ``address``: known in seconds, where Ray tries for a minute."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return None
    return attempt(
        lambda: socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    )


def _explanation(address: str, failure: Exception) -> str:
    reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
    if address == "local":
        return f"Ray could not be started on this machine: {reason}"
    text = f"the Ray cluster at {address} cannot be used: {reason}\n"
    if "auth" in f"{type(failure).__name__} {failure}".lower():
        return text + (
            "It asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or "
            "RAY_AUTH_TOKEN) to the cluster's on every node and here."
        )
    return text + (
        "Check that it runs (ray status) and that cluster.address is the head node's own "
        "address and port, not 127.0.0.1; leave cluster.address out to start Ray here."
    )
