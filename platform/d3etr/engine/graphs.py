"""CUDA graphs: what a GPU does in a step is recorded once for each shape of batch, then replayed.

A step of DETR is thousands of small kernels, which many a host launches more slowly than a GPU
runs them. Replaying takes one launch. So that shapes recur, batches are padded to multiples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.training import Precision
from d3etr.detectors.batch_norm import unchanged
from d3etr.distiller import Distiller
from d3etr.engine.optimiser import autocast
from d3etr.kernels.availability import runs_kernels
from d3etr.structures import ImageBatch, Targets

SIDES = 64
"""Heights and widths of recorded batches are multiples of this, pixels."""
OBJECTS = 16
"""Slots for the objects of an image are multiples of this."""
MOST_GRAPHS = 64
"""Shapes beyond these are not recorded: each takes seconds and some memory."""
_WARM_UPS = 2
"""Passes before recording: kernels are chosen and built in the first."""

Pass = Callable[[ImageBatch, Targets, Tensor, bool], dict[str, Tensor]]
"""Takes a batch, a factor and whether the step distils; leaves gradients, returns named losses
outside the graph."""


def unsupported_reason(distiller: Distiller, device: torch.device) -> str | None:
    """What in a step takes the host, in words; None where nothing does."""
    if not runs_kernels(device):
        return "it needs a GPU, and Triton"
    if distiller.foundation is not None:
        return "the pass of a foundation model (teacher.features) is not recorded"
    if distiller.method.takes_boxes:
        return "how many boxes of teacher.detections an image has is the host's to know"
    if distiller.method.draws_in_steps:
        return "general points are drawn by the host"
    from d3etr.kernels.assignment import LARGEST_SIDE

    if distiller.student.config.queries_need_images:
        return "the proposals of a two-stage student are matched by the host"
    detectors = [part for part in (distiller.student, distiller.teacher) if part is not None]
    most = max(detector.config.queries for detector in detectors)
    if most > LARGEST_SIDE:
        return f"{most:,} queries are matched by the host (at most {LARGEST_SIDE:,} by the GPU)"
    return None


def whole_pass(
    distiller: Distiller, device: torch.device, teacher_precision: Precision, precision: Precision
) -> Pass:
    """A step to record: the teacher on a side stream, the student, losses, backward.

    Args:
        distiller: on the device; it draws no general points.
        device: a GPU.
        teacher_precision: of the teacher's pass.
        precision: of the student's.
    """

    def run(
        images: ImageBatch, targets: Targets, factor: Tensor, distils: bool
    ) -> dict[str, Tensor]:
        current = torch.cuda.current_stream(device)
        side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side_stream.wait_stream(current)
        with torch.cuda.stream(side_stream), autocast(teacher_precision, device):
            teacher = distiller.run_teacher(images, targets=targets) if distils else None
            sums = distiller.normalisers(targets, teacher)
        if teacher is None:
            current.wait_stream(side_stream)
        else:
            teacher = replace(teacher, stream=side_stream)
        pairing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with autocast(precision, device):
            losses = distiller(images, targets, teacher, sums, factor, side_stream=pairing)
        # Not of their sum, which would have to wait for the last of them.
        torch.autograd.backward([loss for loss in losses.values() if loss.requires_grad])
        current.wait_stream(pairing)
        return {name: loss.detach() for name, loss in losses.items()}

    return run


@dataclass(frozen=True)
class _Recorded:
    """One graph with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: list[Tensor]
    losses: dict[str, Tensor]


class StepGraphs:
    """Forward and backward passes as graphs.

    All graphs work in the same memory, one after the other, and leave gradients at the same place.

    Args:
        run: what is recorded; nothing in it may depend on values that the host would have to read.
        parameters: what is trained.
        device: a GPU.
        buffers: what a pass changes beside gradients.
    """

    def __init__(
        self,
        run: Pass,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        buffers: Sequence[Tensor] = (),
    ) -> None:
        self._run, self._parameters, self._device = run, parameters, device
        self._buffers = [*buffers]
        self._graphs: dict[tuple[bool, int | None, tuple[torch.Size, ...]], _Recorded] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._factor = torch.ones((), device=device)

    def __call__(
        self,
        images: ImageBatch,
        targets: Targets,
        factor: float,
        seed: Callable[[], None],
        *,
        distils: bool,
    ) -> dict[str, Tensor]:
        """Do what ``run`` does, to a padded batch.

        Args:
            images: on the device.
            targets: on the device.
            factor: a number that changes from step to step.
            seed: sets the random generators; called right before the pass.
            distils: whether the step does; the others have graphs of their own.

        Returns:
            Losses, to be read before the next call; gradients are in the parameters.
        """
        images, targets = padded(images, targets)
        self._factor.fill_(factor)
        batch = _tensors(images, targets)
        key = distils, targets.labelled, tuple(tensor.shape for tensor in batch)
        if key not in self._graphs and len(self._graphs) == MOST_GRAPHS:
            seed()
            return self._pass(images, targets, distils)
        if key not in self._graphs:
            self._graphs[key] = self._record(images, targets, distils)
        recorded = self._graphs[key]
        for place, tensor in zip(recorded.batch, batch, strict=True):
            place.copy_(tensor)
        seed()
        recorded.graph.replay()
        self._hand_over()
        return recorded.losses

    def _record(self, images: ImageBatch, targets: Targets, distils: bool) -> _Recorded:
        images, targets = copy.deepcopy((images, targets))
        with unchanged(self._buffers):  # the batch counts in the replay
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    self._pass(images, targets, distils)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            losses = self._pass(images, targets, distils)
        return _Recorded(graph, _tensors(images, targets), losses)

    def _pass(self, images: ImageBatch, targets: Targets, distils: bool) -> dict[str, Tensor]:
        """One pass that leaves gradients where all graphs leave them."""
        for parameter in self._parameters:
            parameter.grad = None
        losses = self._run(images, targets, self._factor, distils)
        found = {p: p.grad for p in self._parameters if p.grad is not None}
        if not self._gradients:
            self._gradients = {p: torch.empty_like(gradient) for p, gradient in found.items()}
        if found.keys() != self._gradients.keys():
            raise ValueError("which parameters have gradients depends on the batch")
        torch._foreach_copy_(list(self._gradients.values()), list(found.values()))
        self._hand_over()
        return losses

    def _hand_over(self) -> None:
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient


def padded(images: ImageBatch, targets: Targets) -> tuple[ImageBatch, Targets]:
    """A batch in the next larger recorded shape; the same objects where that changes nothing.

    Args:
        images: B images.
        targets: with T slots for the objects of each.
    """
    images = _padded_images(images)
    slots = targets.labels.shape[1]
    unused = max(-slots % OBJECTS, OBJECTS - slots)
    if unused:
        targets = replace(
            targets,
            labels=functional.pad(targets.labels, (0, unused)),
            boxes_cxcywh=functional.pad(targets.boxes_cxcywh, (0, 0, 0, unused)),
        )
    return images, targets


def _padded_images(images: ImageBatch) -> ImageBatch:
    """The images, those for the teacher too, in the next larger recorded shape."""
    if images.for_teacher is not None:
        theirs = _padded_images(images.for_teacher)
        return replace(_padded_images(replace(images, for_teacher=None)), for_teacher=theirs)
    height, width = images.pixels.shape[-2:]
    right, below = -width % SIDES, -height % SIDES
    if not (right or below):
        return images
    padding = images.padding
    if padding is None:
        padding = torch.zeros_like(images.pixels[:, 0], dtype=torch.bool)
    return ImageBatch(
        functional.pad(images.pixels, (0, right, 0, below)),
        functional.pad(padding, (0, right, 0, below), value=True),
    )


def _tensors(images: ImageBatch, targets: Targets) -> list[Tensor]:
    """What a graph reads of a batch."""
    shown = [images] if images.for_teacher is None else [images, images.for_teacher]
    found = [part for each in shown for part in (each.pixels, each.padding) if part is not None]
    return [*found, targets.labels, targets.boxes_cxcywh, targets.num_objects]
