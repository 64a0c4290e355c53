"""What a training loop knows of the world around it: its rank, its device, its peers.

The loop runs unchanged in one process, under torchrun and under Ray Train; only this object
differs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d3etr.errors import UserError
from d3etr.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.5
COLLECTIVE_TIMEOUT_SECONDS = 900.0
"""How long a worker waits for the others: longer than any evaluation on one worker, shorter
than anybody's patience."""


class TrainContext:
    """One worker's view of the run; this class is a world of one.

    All methods but ``wrap`` are called by all workers alike.

    Args:
        device: of this worker's tensors.
    """

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the workers."""
        return module

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place; returns the same tensor."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every worker's tensor at rank 0 (first dimensions may differ), None elsewhere."""
        return [tensor]

    def barrier(self) -> None:
        """Wait for all workers."""

    def report(self, metrics: dict[str, float]) -> None:
        """Announce that an epoch is done."""


class SingleProcess(TrainContext):
    """A world of one, by default on the first GPU, else on the CPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class ProcessGroup(TrainContext):
    """A world on top of an initialised ``torch.distributed`` process group.

    Args:
        device: a GPU under nccl, the CPU under gloo.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        """DistributedDataParallel around ``module``.

        Buffers are left alone: every worker builds the same ones and changes them alike.
        """
        if self.world_size == 1:
            return module
        return DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every worker's [n_rank, ...] tensor at rank 0, None elsewhere.

        Plain tensors all the way (nothing is pickled): shorter ones are padded for the
        transfer and cut back.
        """
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = tensor.shape[0]
        dist.all_reduce(lengths)
        sizes: list[int] = lengths.tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        pieces = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        if padded.numel():
            dist.gather(padded, pieces, dst=0)
        if pieces is None:
            return None
        return [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all workers."""
        dist.barrier()


class Torchrun(ProcessGroup):
    """A worker that torchrun started: nccl where there are GPUs, gloo on CPUs.

    Use it as a context manager; leaving it ends the process group.

    Args:
        timeout_seconds: how long a collective waits for a worker before the run fails.

    Raises:
        UserError: the process was not started by torchrun, or there are more workers than
            GPUs on this machine.
    """

    def __init__(self, timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> None:
        missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n not in os.environ]
        if missing:
            raise UserError(
                f"{', '.join(missing)} not set: the launcher 'torchrun' expects to be started "
                "as torchrun --nproc-per-node N trainers/run.py RECIPE --launcher torchrun"
            )
        device = _local_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        super().__init__(device)
        logger.info("worker %d of %d on %s (%s)", self.rank, self.world_size, device, backend)

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *exception: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _local_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started worker {local_rank} on a machine with "
            f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def run_on_all_workers(work: Callable[[], T], context: TrainContext) -> T:
    """Run something on every worker and return when all have done it, however long that takes.

    A barrier would fail on the time limit of collective operations. Here a thread works, and the
    workers exchange every half second who is done.

    Args:
        work: done by each worker.
        context: the workers.

    Returns:
        What this worker's ``work`` returned.

    Raises:
        Exception: what this worker's ``work`` raised; its peers lose their connection to it.
    """
    if context.world_size == 1:
        return work()
    job = Future[T]()

    def run() -> None:
        try:
            job.set_result(work())
        except BaseException as error:
            job.set_exception(error)

    threading.Thread(target=run, name="worker-task", daemon=True).start()
    while True:
        failed = job.done() and job.exception() is not None
        done = torch.tensor(int(job.done() and not failed), device=context.device)
        if int(context.all_reduce(done)) == context.world_size or failed:
            return job.result()
        time.sleep(POLL_SECONDS)
