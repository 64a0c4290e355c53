"""``d3etr serve`` for real: replicas that are killed, and a signal to end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from test_replica import png

from d3etr.inference import load

CLIENTS, EACH = 32, 6
START_SECONDS, ANSWER_SECONDS = 600, 300


class Service:
    """The command in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "d3etr", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def address(self) -> str:
        """Where it answers, once it does."""
        return self.wait_for(r"is served at (http://[\d.:]+)/detect")[1]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """What the pattern finds in its output."""
        for _ in range(10 * START_SECONDS):
            found = re.search(pattern, "".join(self.lines))
            if found:
                return found
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def children(self) -> list[Any]:
        """Every process that it started."""
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def replicas(self) -> list[Any]:
        """Those that hold the model."""
        return [each for each in self.children() if "ServeReplica" in " ".join(each.cmdline())]

    def end(self) -> None:
        """At once, with all that it started."""
        if self.process.poll() is None:
            started = self.children()
            self.process.kill()
            for each in started:
                if each.is_running():
                    each.kill()
        self.process.wait()


@pytest.fixture
def service(tiny_weights: Path) -> Iterator[Service]:
    running = Service(str(tiny_weights), "--replicas", "2", "--cpus", "0.5")
    try:
        yield running
    finally:
        running.end()


def detections(address: str, picture: bytes) -> Any:
    request = urllib.request.Request(f"{address}/detect?threshold=0", picture)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        return json.loads(response.read())["detections"]


def health(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/health", timeout=ANSWER_SECONDS) as response:
        return json.loads(response.read())


@pytest.mark.slow
def test_every_request_is_answered_while_a_replica_is_killed_and_at_the_end(
    service: Service, tiny_weights: Path
) -> None:
    pictures = [png(seed) for seed in range(4)]
    predictor = load(tiny_weights)
    expected = [[*each.names] for each in predictor.predict(decoded(pictures), threshold=0)]
    address = service.address()
    assert health(address) == {"status": "ready", "replicas": 2, "waiting": 0}

    done = [0]

    def client(number: int) -> None:
        for request in range(EACH):
            which = (number + request) % len(pictures)
            found = detections(address, pictures[which])
            assert [each["name"] for each in found] == expected[which]
            done[0] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[Future[None]] = [pool.submit(client, number) for number in range(CLIENTS)]
        while done[0] < CLIENTS:
            time.sleep(0.01)
        killed, other = service.replicas()
        killed.kill()
        for each in clients:
            each.result()
    assert done[0] == CLIENTS * EACH and other.is_running()

    with ThreadPoolExecutor(CLIENTS) as pool:
        held = [pool.submit(detections, address, pictures[0]) for _ in range(CLIENTS)]
        while health(address)["waiting"] < CLIENTS // 2 and not all(x.done() for x in held):
            pass
        started = service.children()
        service.process.send_signal(signal.SIGTERM)
        answers = [[each["name"] for each in one.result()] for one in held]
    assert answers == [expected[0]] * CLIENTS
    assert service.process.wait(ANSWER_SECONDS) == 0, "".join(service.lines)
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []


def decoded(pictures: list[bytes]) -> Iterator[Any]:
    from d3etr.data.images import load_image

    return map(load_image, pictures)


def test_an_address_that_is_taken_is_known_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from d3etr.cli.main import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path / "student.onnx"), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err
