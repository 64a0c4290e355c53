"""Join a Ray cluster, or start one here, and leave it as it was found."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import node as ray_node
from ray._private import ray_constants
from ray._private import services as ray_services

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch import limits
from d3etr.launch.orphan_reaper import OrphanReaper
from d3etr.launch.process_exit import (
    NoAnswerError,
    attempt,
    attempt_within,
    is_command,
    skip_shutdown,
)
from d3etr.launch.ray_environment import (
    SEVERAL_MACHINES,
    environment,
    joined_address,
    own_cluster_settings,
    package_environment,
    ray_settings,
    runtime_environment,
    without_proxy,
)
from d3etr.launch.resources import Node
from d3etr.launch.signals import held, stop_requested, terminable
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

logger = get_logger(__name__)

CONNECT_SECONDS = 60.0
"""ray.init has no limit of its own: it waits for ever for a cluster that is half reachable."""
START_SECONDS = 120.0
PORT_TURN_MS = 300
LEAVE_SECONDS = 30.0
"""Where the head is gone, Ray leaves after some 15 seconds."""
PROBE_SECONDS = 10.0
ANSWER_SECONDS = 2.0
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
                changed = package_environment() | without_proxy()
                stack.enter_context(environment(changed, override=True))
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
        self._reaper: OrphanReaper | None = None
        """Of a cluster that was started here."""

    def open(self) -> None:
        """Connect.

        Raises:
            UserError: the cluster does not answer or refuses.
        """
        # It would end this process at a termination signal, by SIGABRT.
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
        failure = self._start() if self._address == "local" else self._join()
        if isinstance(failure, NoAnswerError):
            self._abandoned = True
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
        elif self._reaper is not None:
            self._reaper.dismiss()

    def _start(self) -> Exception | None:
        """Start Ray here.

        That cannot be interrupted. A command ends in the middle of it; where the process goes on,
        the end of the start is waited for.
        """
        # Ray read the variable when it was imported.
        ray_constants.ENABLE_RAY_CLUSTER = os.environ[SEVERAL_MACHINES] != "0"
        options = {
            **_options("local"),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        if _WAIT_FOR_PORT is not None:
            ray_node.wait_for_persisted_port = _wait_for_port
        if _POPEN is not None and sys.platform == "linux":
            ray_services.ConsolePopen = _popen_in_own_session
        unless = stop_requested if is_command() else None
        self._reaper = OrphanReaper()
        with environment(self._reaper.environment, override=True):
            return attempt_within(START_SECONDS, partial(ray.init, **options), self._left, unless)

    def _join(self) -> Exception | None:
        """Join a cluster, which may be waited for in vain: a signal ends that."""
        failure = _probe(self._address)
        if failure is not None:
            return failure
        join = partial(ray.init, **_options(self._address), runtime_env=runtime_environment())
        return attempt_within(CONNECT_SECONDS, join, self._left, stop_requested)


# Parts of Ray that are not for others: a version that lacks one keeps its own ways with signals.
_WAIT_FOR_PORT: Any = getattr(ray_node, "wait_for_persisted_port", None)
_POPEN: Any = getattr(ray_services, "ConsolePopen", None)


def _wait_for_port(*place: Any, timeout_ms: int = 30_000, **more: Any) -> int:
    """Ray's own, which keeps all of Python from running while it waits, in short turns."""
    end = time.monotonic() + timeout_ms / 1000
    while True:
        try:
            return int(_WAIT_FOR_PORT(*place, timeout_ms=min(timeout_ms, PORT_TURN_MS), **more))
        except Exception:
            if stop_requested() or time.monotonic() > end:
                raise
        time.sleep(0.01)


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
