"""Join a Ray cluster, or start one here, and leave it as it was found."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import services as ray_services

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch import limits
from d3etr.launch.process import (
    NoAnswerError,
    attempt,
    attempt_within,
    held,
    is_command,
    skip_shutdown,
    stop_requested,
    terminable,
)
from d3etr.launch.ray_environment import (
    SEVERAL_MACHINES,
    environment,
    joined_address,
    own_cluster_overrides,
    own_cluster_settings,
    ray_settings,
    runtime_environment,
)
from d3etr.launch.resources import Node
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

logger = get_logger(__name__)

CONNECT_SECONDS = 60.0
"""ray.init has no limit of its own: it waits for ever for a cluster that is half reachable."""
START_SECONDS = 120.0
LEAVE_SECONDS = 30.0
"""Where the head is gone, Ray leaves after some 15 seconds."""
PROBE_SECONDS = 10.0
OBJECT_STORE_BYTES = 128 * 2**20
"""Training passes nothing through Ray's object store."""


@contextmanager
def connected(cluster: ClusterConfig, on_progress: OnProgress) -> Iterator[None]:
    """A Ray connection for the block.

    An existing connection is used and left open. Else ``cluster.address``, the cluster of the
    submitted job that this is (``RAY_ADDRESS``), or a cluster started here that ends with the
    block. A command's process stays connected until its end.

    Raises:
        UserError: the cluster does not answer or refuses.
        KeyboardInterrupt: a signal came meanwhile; a cluster that was starting here is ended.
    """
    with ExitStack() as stack:
        stack.enter_context(environment(ray_settings(cluster)))
        if not ray.is_initialized():
            address = joined_address(cluster) or "local"
            if address == "local":
                stack.enter_context(environment(own_cluster_settings()))
                stack.enter_context(environment(own_cluster_overrides(), override=True))
            connection = _Connection(address)
            stack.push(connection.leave)
            joining = f"joining the Ray cluster at {address}"
            on_progress("starting Ray" if address == "local" else joining)
            with held():
                connection.open()
        stack.enter_context(terminable())
        yield


class _Connection:
    """This process's connection to Ray.

    Args:
        address: of a cluster; ``local`` starts one here.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._abandoned = False
        """A thread waits inside of Ray, which must not be called any more."""
        self._left = threading.Event()

    def open(self) -> None:
        """Connect.

        Raises:
            UserError: the cluster does not answer or refuses.
        """
        # It would end this process at a termination signal, by SIGABRT.
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
        failure = self._start() if self._address == "local" else self._join()
        self._abandoned = isinstance(failure, NoAnswerError)
        if failure is not None:
            raise UserError(_explanation(self._address, failure)) from failure

    def leave(self, *error: object) -> None:
        """Disconnect, which ends a cluster that was started here; that it fails costs nothing.

        A command's end does that: a thread that is inside of Ray while another one disconnects
        ends the process with code 1, and so does Ray where its own processes end before.
        """
        if skip_shutdown() or self._abandoned:
            return
        with held():
            failure = attempt_within(LEAVE_SECONDS, ray.shutdown)
        self._left.set()
        if failure is not None:
            logger.warning("Ray did not end in order: %r", failure)

    def _start(self) -> Exception | None:
        """Start Ray here.

        That cannot be interrupted. A command ends in the middle of it; where the process goes on,
        the end of the start is waited for.
        """
        # Ray read the variable when it was imported.
        ray_constants.ENABLE_RAY_CLUSTER = os.environ[SEVERAL_MACHINES] != "0"
        start = partial(
            ray.init,
            **_options("local"),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        if _POPEN is not None and sys.platform == "linux":
            ray_services.ConsolePopen = _popen_in_own_session
        unless = stop_requested if is_command() else lambda: False
        return attempt_within(START_SECONDS, start, self._left, unless)

    def _join(self) -> Exception | None:
        """Join a cluster, which may be waited for in vain: a signal ends that."""
        failure = _probe(self._address)
        if failure is not None:
            return failure
        join = partial(ray.init, **_options(self._address), runtime_env=runtime_environment())
        return attempt_within(CONNECT_SECONDS, join, self._left, stop_requested)


_POPEN: Any = getattr(ray_services, "ConsolePopen", None)
"""Not for others: a version of Ray that lacks it keeps its own ways with signals."""


def _popen_in_own_session(*command: Any, **options: Any) -> Any:
    """Ray's own, out of reach of what a terminal or an init process sends to a process group.

    Ray's processes would end at once, and this one with them, with code 1 and no message. They
    end with this process all the same, as the kernel kills them (on Linux only).
    """
    return _POPEN(*command, **options, start_new_session=True)


def _options(address: str) -> dict[str, Any]:
    return {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}


def cluster_nodes() -> list[Node]:
    """The machines of the connected cluster; Ray takes some 15 seconds to miss a lost one."""
    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(offer.get("CPU", 0.0), offer.get("GPU", 0.0)) for offer in offers]


def free_resources() -> Node:
    """What nobody uses at the moment, over the whole cluster."""
    free = ray.available_resources()
    return Node(free.get("CPU", 0.0), free.get("GPU", 0.0))


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
        limit = limits.explained(failure)
        return f"Ray could not be started on this machine: {limit or reason}"
    text = f"the Ray cluster at {address} cannot be used: {reason}\n"
    if "auth" in f"{type(failure).__name__} {failure}".lower():
        return text + (
            "It asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or "
            "RAY_AUTH_TOKEN) to the cluster's on every node and here."
        )
    if urllib.request.getproxies():
        text += (
            "A proxy is set in the environment (http_proxy), which Ray would use too: put the "
            "cluster's addresses into no_proxy.\n"
        )
    return text + (
        "Check that it runs (ray status) and that cluster.address is the head node's own "
        "address and port, not 127.0.0.1; leave cluster.address out to start Ray here."
    )
