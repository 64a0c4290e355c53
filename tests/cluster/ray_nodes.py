"""Ray nodes by real ``ray start`` on hosts, and a driver beside the head."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes
import ray
from hosts import Host, namespaces, why_no_namespaces

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
START_SECONDS = 600.0
"""Long: where other things take the machine, a slow start is no failure."""
START_ATTEMPTS = 4
"""Ray itself gives up on a node that is not ready within 30 seconds."""


@dataclass
class RayNodes:
    """A cluster of nodes with one CPU each; every process of it can be killed.

    Attributes:
        hosts: the first is the head's.
        folder: of logs and Ray's own files; short, as Ray's sockets are in it.
        port: of the head.
        environment: of every process.
    """

    hosts: list[Host]
    folder: Path
    port: int
    environment: dict[str, str]
    _nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _started: int = 0

    @property
    def address(self) -> str:
        """What nodes and drivers join."""
        return f"{self.hosts[0].address}:{self.port}"

    def start_node(self, index: int, *, without: Path | None = None) -> None:
        """``ray start`` on a host; returns once the node takes connections.

        Args:
            index: of the host.
            without: a folder whose files the node does not see; root only.
        """
        for attempt in range(START_ATTEMPTS):
            self._started += 1
            log = self.folder / f"node{self._started}.log"
            node = self.start(self._ray_start(index, without), log.stem, self.hosts[index])
            self._nodes[index] = node
            try:
                wait_until(lambda log=log: "Ray runtime started" in log.read_text(), node, log)
                return
            except AssertionError:
                self.kill_node(index)
                if attempt == START_ATTEMPTS - 1:
                    raise

    def _ray_start(self, index: int, without: Path | None) -> list[str]:
        address, place = self.hosts[index].address, self.folder / f"ray{self._started}"
        joins = [f"--port={self.port}", "--head"] if index == 0 else [f"--address={self.address}"]
        command = [str(PROGRAMS / "ray"), "start", "--block", *joins]
        command += [f"--node-ip-address={address}", f"--temp-dir={place}"]
        command += ["--num-cpus=1", "--disable-usage-stats", f"--object-store-memory={2**27}"]
        command += ["--include-dashboard=false"] if index == 0 else []
        if without is None:
            return command
        hide = 'mount -t tmpfs none "$0" && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", hide, str(without), *command]

    def kill_node(self, index: int) -> None:
        """SIGKILL for all processes of a node."""
        processes.kill(self._nodes.pop(index))

    def start(
        self, command: Sequence[str], name: str, host: Host | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process, beside the head unless told otherwise."""
        host = host or self.hosts[0]
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*host.prefix, *command],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        """Kill all nodes, the head last."""
        for index in sorted(self._nodes, reverse=True):
            self.kill_node(index)


@contextlib.contextmanager
def ray_nodes(folder: Path, count: int = 2) -> Iterator[RayNodes]:
    """A cluster of ``count`` nodes, in network namespaces where that is possible."""
    with contextlib.ExitStack() as stack:
        if why_no_namespaces() is None:
            hosts, port = stack.enter_context(namespaces(count)), 6379
        else:
            hosts, port = [Host(ray.util.get_node_ip_address())] * count, _free_port()
        nodes = RayNodes(hosts, folder, port, _environment(folder))
        stack.callback(nodes.close)
        for index in range(count):
            nodes.start_node(index)
        yield nodes


def _environment(folder: Path) -> dict[str, str]:
    """Ray's token, and nothing that the user of this machine has set for Ray or gloo."""
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    foreign = ("RAY_", "MLFLOW_", "GLOO_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": str(ROOT / "platform"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    ready: Callable[[], Any],
    process: subprocess.Popen[bytes],
    log: Path,
    seconds: float = START_SECONDS,
) -> None:
    """Wait for ``ready``; a process that ends meanwhile fails with what it wrote."""
    deadline = time.monotonic() + seconds
    while not ready():
        late = time.monotonic() > deadline
        if late or process.poll() is not None:
            what = "was not ready in time" if late else f"ended with {process.returncode}"
            raise AssertionError(f"{process.args!r} {what}:\n{log.read_text()[-6000:]}")
        time.sleep(0.05)
