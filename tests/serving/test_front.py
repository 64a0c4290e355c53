"""The HTTP side of a service, with a function in the replicas' place."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvicorn

from d3etr.serving.answers import Answer
from d3etr.serving.front import Front
from d3etr.serving.settings import ServeSettings

SETTINGS = ServeSettings(model="student.onnx", max_queue=3, max_image_mb=0.1)


class Fake:
    """A front that listens, and what its replicas would do."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, float | None]] = []
        self.free = threading.Event()
        self.free.set()
        self.replicas = 2
        app = Front(SETTINGS, self._detect, lambda: self.replicas).app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))

    @property
    def port(self) -> int:
        found: int = self.server.servers[0].sockets[0].getsockname()[1]
        return found

    async def _detect(self, picture: bytes, threshold: float | None) -> Answer:
        self.seen.append((picture, threshold))
        await asyncio.to_thread(self.free.wait, 20)
        if picture == b"fault":
            raise ValueError("of our own")
        return Answer(200, {"detections": len(picture)})

    def ask(
        self, path: str = "/detect", body: bytes | None = b"picture", method: str = "POST"
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)


@pytest.fixture(scope="module")
def front() -> Iterator[Fake]:
    fake = Fake()
    thread = threading.Thread(target=fake.server.run)
    thread.start()
    while not fake.server.started:
        time.sleep(0.01)
    yield fake
    fake.server.should_exit = True
    thread.join(20)


def test_a_picture_gets_its_detections(front: Fake) -> None:
    assert front.ask("/detect?threshold=0.25")[:2] == (200, {"detections": 7})
    assert front.seen[-1] == (b"picture", 0.25)
    front.ask()
    assert front.seen[-1] == (b"picture", None)


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        (("/detect", b""), 400, "the body is empty"),
        (("/detect?threshold=half", b"x"), 400, "threshold is 'half'; expected a number from 0"),
        (("/detect?threshold=nan", b"x"), 400, "from 0 to 1"),
        (("/detect?treshold=0.5", b"x"), 400, "the address has 'treshold'"),
        (("/detect", b"x" * 100_001), 413, "expected at most 0.1 MB"),
        (("/detect", b"x" * 3_000_000), 413, "the body has 3.0 MB"),
        (("/detect", None, "GET"), 405, "expected POST /detect"),
        (("/other", None, "GET"), 404, "GET /other: expected POST /detect"),
        (("/detect", b"fault"), 500, "the server's log"),
    ],
)
def test_anything_else_is_refused_as_json(
    front: Fake, request_: tuple[Any, ...], status: int, text: str
) -> None:
    found, body, _ = front.ask(*request_)
    assert found == status and text in body["error"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(front: Fake) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
    connection.request("POST", "/detect", (b"x" * 1000 for _ in range(200)), encode_chunked=True)
    assert connection.getresponse().status == 413


def test_a_client_that_breaks_off_is_no_fault_of_the_service() -> None:
    async def detect(picture: bytes, threshold: float | None) -> Answer:
        raise AssertionError("there is no picture")

    front, sent = Front(SETTINGS, detect, lambda: 1), list[Any]()
    arriving = iter([{"type": "http.request", "body": b"half", "more_body": True}])

    async def receive() -> Any:
        return next(arriving, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/detect", "query_string": b""}
    asyncio.run(front.app(scope | {"headers": []}, receive, send))  # raises nothing
    assert sent[0]["status"] == 400 and front._held == 0


def test_more_requests_than_may_wait_are_refused_and_health_says_how_many_do(front: Fake) -> None:
    front.free.clear()
    before = len(front.seen)
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(front.ask) for _ in range(SETTINGS.max_queue)]
        while len(front.seen) < before + SETTINGS.max_queue:
            time.sleep(0.01)
        status, body, headers = front.ask()
        assert status == 503 and "3 requests are waiting" in body["error"]
        assert headers["retry-after"] == "1"
        health = front.ask("/health", None, "GET")
        assert health[:2] == (200, {"status": "ready", "replicas": 2, "waiting": 3})
        front.free.set()
        assert [each.result()[0] for each in held] == [200] * SETTINGS.max_queue
    assert front.ask()[0] == 200


def test_without_a_replica_the_service_is_not_ready(
    front: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "replicas", 0)
    assert front.ask("/health", None, "GET")[0] == 503
