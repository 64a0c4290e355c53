"""What dead drivers left reserved is found and freed, and nothing else is."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import ray

pytestmark = pytest.mark.slow

PROGRAMS = Path(sys.executable).parent
SECONDS = 120.0
RESERVE = """
import sys, time
import ray
from ray.util import placement_group
ray.init(address=sys.argv[1], logging_level="ERROR")
group = placement_group([{"CPU": 1}], lifetime=None if sys.argv[2] == "bound" else "detached")
ray.get(group.ready())
print(group.id.hex(), flush=True)
time.sleep(600)
"""
FREE = """
import sys
import ray
from d3etr.launch.sweeps.leaks import free_leaked_groups
ray.init(address=sys.argv[1], logging_level="ERROR")
freed = free_leaked_groups()
room = ray.available_resources().get("CPU", 0) >= 1
print("room" if room else "full", *freed, flush=True)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray of three CPUs with its dashboard, which knows of jobs and reservations."""
    folder, port = Path(tempfile.mkdtemp(prefix="d3etr-")), _free_port()
    (folder / "token").write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    command = [str(PROGRAMS / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += [f"--dashboard-port={_free_port()}", f"--temp-dir={folder}", "--num-cpus=3"]
    command += ["--disable-usage-stats"]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"{ray.util.get_node_ip_address()}:{port}"
    finally:
        processes.kill(head)
        shutil.rmtree(folder, ignore_errors=True)


def _driver(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _line(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    return driver.stdout.readline().strip()


def _reserved(address: str, kind: str) -> tuple[subprocess.Popen[str], str]:
    """A driver that holds a placement group, once it has it; it waits for Ray to start."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        driver = _driver(RESERVE, address, kind)
        if group := _line(driver):
            return driver, group
        driver.wait()
        time.sleep(1)
    raise AssertionError(f"no Ray at {address}")


def _freed(address: str) -> tuple[bool, set[str]]:
    """Whether there is room, and what had to be freed for it."""
    driver = _driver(FREE, address)
    word, *groups = _line(driver).split()
    assert driver.wait() == 0
    return word == "room", set(groups)


def test_what_a_dead_driver_reserved_is_freed_and_nothing_else(address: str) -> None:
    alive, kept = _reserved(address, "bound")
    dead, leaked = _reserved(address, "bound")
    gone, detached = _reserved(address, "detached")
    try:
        for driver in (dead, gone):
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        deadline, room, freed = time.monotonic() + SECONDS, False, set[str]()
        while time.monotonic() < deadline and not room:
            room, more = _freed(address)
            freed |= more
        assert room
        assert freed <= {leaked}, (kept, detached)  # Ray may have been faster
    finally:
        alive.kill()
