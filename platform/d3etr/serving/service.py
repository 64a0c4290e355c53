"""A service from its start to its end: replicas on Ray Serve, an HTTP server before them."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import socket
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import ray
import uvicorn
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.schema import LoggingConfig

from d3etr.config.infrastructure import ClusterConfig
from d3etr.config.urls import named_location
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.process import attempt_within, held
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.resources import Demand, describe, room
from d3etr.loading import is_registered
from d3etr.logs import get_logger
from d3etr.progress import OnProgress
from d3etr.serving.answers import BUSY, Answer, refusal
from d3etr.serving.front import Front
from d3etr.serving.replica import PROBLEM, Replica
from d3etr.serving.settings import ServeSettings

logger = get_logger(__name__)

TRIES = 4
"""Replicas that a request meets before it is refused: each may be lost while it detects."""
END_SECONDS = 30.0
"""Time limit of Ray Serve's end."""
HEALTH_SECONDS = 2.0
"""Between Ray Serve's looks at its replicas."""
DEPLOYMENT = "detector"


def run_service(
    settings: ServeSettings, ready: Callable[[str], None], on_progress: OnProgress
) -> None:
    """Serve a model until a signal ends it; requests in flight are answered first.

    Args:
        settings: of the service.
        ready: takes the service's address, once it answers there.
        on_progress: takes what is being waited for.

    Raises:
        UserError: the model cannot be loaded, the address is taken, or the cluster has no room.
        RunFailedError: Ray Serve did not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(settings))
        settings = _settled(settings)
        stack.enter_context(connected(ClusterConfig(), on_progress))
        _require_room(settings)
        on_progress(f"loading {settings.model}")
        name = f"d3etr-{uuid.uuid4().hex[:8]}"
        stack.callback(_end, name)
        handle = _deploy(settings, name)
        front = Front(settings, _asking(handle), lambda: _running(name))
        server = uvicorn.Server(
            uvicorn.Config(
                front.app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
                lifespan="off",
            )
        )
        listener.listen()
        ready(f"http://{settings.host}:{listener.getsockname()[1]}")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # what uvicorn makes of the signal once all are answered
            pass


def _listen(settings: ServeSettings) -> socket.socket:
    """A socket at the service's address, which takes no connections yet.

    So an address that is taken is known before anything is started.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}. Give "
            "another --port (0: any that is free), or --host"
        ) from error
    return listener


def _settled(settings: ServeSettings) -> ServeSettings:
    """The model by what does not change: all replicas, also later ones, hold the same.

    A registered model's alias may move on, and a relative path is another elsewhere.
    """
    if is_registered(settings.model):
        from d3etr.tracking.registry import pinned, registry_uri

        return replace(settings, model=pinned(settings.model), tracking_uri=registry_uri())
    location = named_location(settings.model)
    if isinstance(location, Path):
        return replace(settings, model=str(location.absolute()))
    return settings


def _require_room(settings: ServeSettings) -> None:
    nodes = cluster_nodes()
    fitting = room(nodes, settings.cpus, settings.gpus)
    if fitting < settings.replicas:
        demand = Demand(settings.replicas, settings.cpus, settings.gpus)
        asked = str(demand).replace("worker", "replica")
        raise UserError(
            f"the cluster has {describe(nodes)}: {asked} do not fit, there is room for "
            f"{fitting or 'none'}. Give fewer --replicas, or less --cpus or --gpus for each"
        )


def _deploy(settings: ServeSettings, name: str) -> Any:
    """Start the replicas; a handle by which they are asked, once one of them has answered."""
    options = {
        "name": DEPLOYMENT,
        "num_replicas": settings.replicas,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # One batch is detected while the next is gathered. The rest waits before the replicas,
        # where it goes to whichever is free and a lost replica does not take it along.
        "max_ongoing_requests": 2 * settings.max_batch,
        "max_queued_requests": -1,
        # A model that cannot be loaded once is not tried again.
        "max_constructor_retry_count": 1,
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": 5.0,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
    application = serve.deployment(Replica).options(**options).bind(settings)
    try:
        with held():  # an interruption within Ray leaves half of a service
            serve.start(proxy_location="Disabled")
            handle = serve.run(application, name=name, route_prefix=None)
        answer = asyncio.run(_asking(handle)(a_picture(settings.max_megapixels), None))
    except Exception as error:  # Ray has errors of many types
        raise _explained(error, settings, _report(name)) from error
    if answer.status != 200:
        raise RunFailedError(f"{settings.model}: the first request failed: {answer.body}")
    return handle


def _report(name: str) -> str:
    """What Ray Serve says about a service that did not start."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    parts = [application.message, *(each.message for each in application.deployments.values())]
    return "\n".join(parts)


def _explained(error: Exception, settings: ServeSettings, report: str) -> Exception:
    found = re.search(re.escape(PROBLEM) + r'("(?:[^"\\]|\\.)*")', f"{report}\n{error}")
    if found:
        return UserError(json.loads(found[1]))
    last = (report.strip() or str(error).strip() or type(error).__name__).splitlines()[-1]
    return RunFailedError(f"{settings.model} could not be served: Ray Serve reports: {last}")


def a_picture(most: float) -> bytes:
    """A black picture as a request has it, of 640 x 480 pixels or ``most`` megapixels."""
    width, height = 640, 480
    factor = min(1.0, math.sqrt(most * 1e6 / (width * height)))
    file = BytesIO()
    Image.new("RGB", (max(1, int(factor * width)), max(1, int(factor * height)))).save(file, "PNG")
    return file.getvalue()


def _asking(handle: Any) -> Callable[[bytes, float | None], Any]:
    """Asks a replica, and another one if that is lost: detecting twice does no harm."""

    async def detect(picture: bytes, threshold: float | None) -> Answer:
        for _ in range(TRIES):
            try:
                answer: Answer = await handle.detect.remote(picture, threshold)
                return answer
            except RayActorError as error:
                logger.warning("a replica was lost: %s", str(error).partition("\n")[0])
        return refusal(BUSY, f"{TRIES} replicas were lost while they detected: try again later")

    return detect


def _running(name: str) -> int:
    """Replicas that can answer."""
    application = serve.status().applications.get(name)
    deployments = {} if application is None else application.deployments
    found = deployments.get(DEPLOYMENT)
    return 0 if found is None else int(found.replica_states.get("RUNNING", 0))


def _end(name: str) -> None:
    """End this service's replicas; others on the same cluster stay."""
    if ray.is_initialized():
        with held():
            attempt_within(END_SECONDS, lambda: serve.delete(name))
