"""Where Ray Train workers meet: at their Ray nodes' addresses, and nowhere else.

Left alone, gloo looks for its peers under the machine's own name, which in containers often means
"myself" (127.x), and PyTorch's store on rank 0 listens on every interface of its machine. Ray knows
better: every node has an address that the others reach; that of a Ray that is started for one run
is the loopback interface's.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil  # type: ignore[import-untyped]  # Ray brings it
import ray
import ray.train
import ray.train.torch
import ray.util
import torch.distributed as dist

VARIABLE = "GLOO_SOCKET_IFNAME"

_listening: socket.socket | None = None
"""Of rank 0, for the store where the workers meet."""


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an IPv4 address; None if none has it.

    Args:
        address: such as ``10.0.0.1``.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            return str(name).partition(":")[0]  # a label of a second address has a colon
    return None


def name_interface() -> None:
    """Have gloo use the interface of this Ray node's address, unless the user has named one.

    Called in a worker before it joins its process group.
    """
    if VARIABLE in os.environ:
        return
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ[VARIABLE] = interface


def listen() -> tuple[str, int]:
    """Listen for the other workers at this node's address alone, in rank 0; returns the place."""
    global _listening
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listening = socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
    return address, _listening.getsockname()[1]


def join(place: tuple[str, int], rank: int, workers: int, backend: str, seconds: int) -> None:
    """Join the process group as ``rank`` of ``workers``.

    Args:
        place: where rank 0 listens.
        rank: of this worker.
        workers: how many there are.
        backend: gloo or nccl.
        seconds: time limit of collective operations, and of waiting for all workers.
    """
    here = ray.train.get_context()
    # What torchrun sets, and Ray too: PyTorch may choose a device by it.
    places = {"LOCAL_RANK": here.get_local_rank(), "LOCAL_WORLD_SIZE": here.get_local_world_size()}
    places |= {"RANK": rank, "WORLD_SIZE": workers, "NODE_RANK": here.get_node_rank()}
    os.environ.update({name: str(number) for name, number in places.items()})
    if backend == "gloo":
        name_interface()
    elif "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        # A collective operation that takes too long ends the worker.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    limit = timedelta(seconds=seconds)
    options: dict[str, Any] = {"is_master": rank == 0, "timeout": limit}
    if rank == 0:
        assert _listening is not None
        options["master_listen_fd"] = _listening.detach()
    store = dist.TCPStore(*place, workers, **options)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=limit)


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, but for where the workers meet."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Have all workers join; called by Ray Train's controller."""
        place, workers = worker_group.execute_single(0, listen), len(worker_group)
        arguments = (workers, backend_config.backend, backend_config.timeout_s)
        joining = [
            worker_group.execute_single_async(rank, join, place, rank, *arguments)
            for rank in range(workers)
        ]
        ray.get(joining)


class TorchConfig(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Ray's ``TorchConfig``, whose workers meet at their Ray nodes' addresses."""

    @property
    def backend_cls(self) -> type:
        """What makes the process group."""
        return _Backend
