"""The network interface that a machine is reached by.

gloo looks for its peers under the machine's own name, and in containers that name often means
"myself" (127.x). Ray knows better: every node has an address that the others reach.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys

import ray.train.torch
import ray.util

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFCONF = 0x8912
"""Linux's request for all addresses of all interfaces."""
NAME_BYTES, ENTRY_BYTES = 16, 40
"""Of a ``struct ifreq`` on 64-bit machines: the name, a socket address, padding."""
MOST_ADDRESSES = 1024


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an IPv4 address; None if none has it.

    Args:
        address: such as ``10.0.0.1``.
    """
    return _interfaces().get(address)


def name_interface() -> None:
    """Tell gloo the interface of this Ray node's address, unless the user has.

    Called in a worker before it joins its process group.
    """
    if VARIABLE in os.environ:
        return
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ[VARIABLE] = interface


def _interfaces() -> dict[str, str]:
    """IPv4 address to name of interface, on Linux."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return {}
    import fcntl

    found = ctypes.create_string_buffer(MOST_ADDRESSES * ENTRY_BYTES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iP", len(found), ctypes.addressof(found))
        size, _ = struct.unpack("iP", fcntl.ioctl(probe, SIOCGIFCONF, request))
    entries = (found.raw[start : start + ENTRY_BYTES] for start in range(0, size, ENTRY_BYTES))
    return dict(map(_entry, entries))


def _entry(entry: bytes) -> tuple[str, str]:
    name = entry[:NAME_BYTES].partition(b"\0")[0].decode()
    # After the name: address family and port, two bytes each. A label of a second address is
    # the interface's name, a colon and more.
    address = socket.inet_ntoa(entry[NAME_BYTES + 4 : NAME_BYTES + 8])
    return address, name.partition(":")[0]


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, with gloo told where its peers are."""

    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        """Set workers up before their process group is made."""
        if backend_config.backend == "gloo":
            worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


class TorchConfig(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Ray's ``TorchConfig``; workers on CPUs meet at their Ray nodes' addresses."""

    @property
    def backend_cls(self) -> type:
        """What sets the workers up."""
        return _Backend
