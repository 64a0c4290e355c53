"""Hosts for Ray nodes: network namespaces of this machine, or only other processes.

A namespace has a network of its own: an address, an interface, ports, and a host name that means
"myself", as in many containers. Only root can make them (Debian's iproute2).
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
NAMES = Path("/etc/netns")
"""``ip netns exec`` shows a namespace the files in this folder as those in /etc."""


@dataclass(frozen=True)
class Host:
    """Where processes run.

    Attributes:
        address: IP address that the other hosts reach.
        prefix: of each command.
    """

    address: str
    prefix: tuple[str, ...] = ()


def why_no_namespaces() -> str | None:
    """What is missing to make network namespaces; None if nothing is."""
    if os.geteuid() != 0:
        return "not root"
    if shutil.which("ip") is None:
        return "no ip command (Debian: apt-get install iproute2)"
    name = f"d3etr-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "probe", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()
    finally:
        _remove(name)
    return None


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Hosts on one switch, each a network namespace with an interface ``eth0``."""
    switch, *names = (f"d3etr-{os.getpid()}-{index}" for index in range(count + 1))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, switch)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        hosts = []
        for index, name in enumerate(names, start=1):
            stack.callback(_remove, name)
            hosts.append(_host(switch, name, index))
        yield hosts


def _host(switch: str, name: str, index: int) -> Host:
    address = f"{NETWORK}.{index}"
    _ip("netns", "add", name)
    port = ["type", "veth", "peer", "name", "eth0", "netns", name]
    _ip("-n", switch, "link", "add", f"port{index}", *port)
    _ip("-n", switch, "link", "set", f"port{index}", "master", "switch", "up")
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", name, "route", "add", "default", "dev", "eth0")
    (NAMES / name).mkdir(parents=True)
    text = f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n"
    (NAMES / name / "hosts").write_text(text)
    return Host(address, ("ip", "netns", "exec", name))


def _ip(*arguments: str) -> None:
    command: Sequence[str] = ["ip", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _remove(name: str) -> None:
    """Remove a namespace and every process in it."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in inside.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    shutil.rmtree(NAMES / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        NAMES.rmdir()  # only if nobody else has anything there
