"""The HTTP side of a service: limits, the bound of the queue, health."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from d3etr.logs import get_logger
from d3etr.serving.answers import (
    BAD_REQUEST,
    BUSY,
    FAILED,
    TOO_LARGE,
    TOO_SLOW,
    Answer,
    RefusedError,
    refusal,
)
from d3etr.serving.settings import ServeSettings

logger = get_logger(__name__)

STATUS_SECONDS = 5.0
BODY_SECONDS = 30.0
"""How long a body may take to arrive: a client that sends nothing must not hold a place."""
LINGER_SECONDS = 5.0
"""How long the rest of a refused body is read and dropped: else the client meets a reset
connection before it reads why."""


class Detect(Protocol):
    """Has a replica answer one request."""

    def __call__(self, picture: bytes, threshold: float | None, /) -> Awaitable[Answer]:
        """Detections, or why there are none.

        Args:
            picture: an image file's content.
            threshold: lowest score of a detection; None: the service's.
        """
        ...


class Front:
    """Takes requests, and hands those within the limits to replicas.

    Args:
        settings: of the service.
        detect: asks a replica.
        running_replicas: how many replicas can answer; may block.
    """

    def __init__(
        self, settings: ServeSettings, detect: Detect, running_replicas: Callable[[], int]
    ) -> None:
        self._settings, self._detect, self._running = settings, detect, running_replicas
        self._held = 0
        self.app = Starlette(
            routes=[
                Route("/detect", self._answer_detect, methods=["POST"]),
                Route("/health", self._answer_health),
            ],
            exception_handlers={HTTPException: _no_such_page, Exception: _failed},
        )

    async def _answer_detect(self, request: Request) -> JSONResponse:
        if self._held >= self._settings.max_queue:
            await _drop_body(request)
            return _response(refusal(BUSY, f"{self._held} requests are waiting: try again later"))
        self._held += 1
        try:
            threshold = _threshold(request)
            return _response(await self._detect(await self._body(request), threshold))
        except RefusedError as refused:
            if not refused.body_was_read:
                await _drop_body(request)
            return _response(refused.answer)
        finally:
            self._held -= 1

    async def _answer_health(self, request: Request) -> JSONResponse:
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                replicas = await asyncio.to_thread(self._running)
        except TimeoutError:
            return _response(refusal(BUSY, "Ray Serve does not say whether a replica is running"))
        status = "ready" if replicas else "no replica is running"
        body = {"status": status, "replicas": replicas, "waiting": self._held}
        return _response(Answer(200 if replicas else BUSY, body))

    async def _body(self, request: Request) -> bytes:
        most = self._settings.max_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise _too_large(int(announced), most)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise _too_large(len(body), most)
        except TimeoutError:
            text = f"the body did not arrive within {BODY_SECONDS:g} seconds"
            raise RefusedError(TOO_SLOW, text, body_was_read=True) from None
        except ClientDisconnect:  # nobody reads the answer
            text = "the connection ended before the body had arrived"
            raise RefusedError(BAD_REQUEST, text, body_was_read=True) from None
        if not body:
            text = "the body is empty; expected the bytes of an image file"
            raise RefusedError(BAD_REQUEST, text, body_was_read=True)
        return bytes(body)


def _too_large(found: int, most: int) -> RefusedError:
    text = f"the body has {found / 1e6:.1f} MB or more; expected at most {most / 1e6:g} MB"
    return RefusedError(TOO_LARGE, text)


def _threshold(request: Request) -> float | None:
    """Of the address (``?threshold=0.3``); nothing else may stand there."""
    others = sorted(set(request.query_params) - {"threshold"})
    if others:
        text = f"the address has '{others[0]}'; expected nothing but 'threshold' after '?'"
        raise RefusedError(BAD_REQUEST, text)
    given = request.query_params.get("threshold")
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        text = f"threshold is '{given}'; expected a number from 0 to 1"
        raise RefusedError(BAD_REQUEST, text)
    return number


async def _drop_body(request: Request) -> None:
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (await request.receive()).get("more_body"):
                pass
    except (TimeoutError, ClientDisconnect):
        pass


def _response(answer: Answer) -> JSONResponse:
    return JSONResponse(answer.body, answer.status, dict(answer.headers))


async def _no_such_page(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else FAILED
    text = f"{request.method} {request.url.path}: expected POST /detect or GET /health"
    return _response(refusal(status, text))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _response(refusal(FAILED, "detecting failed; the server's log says why"))
