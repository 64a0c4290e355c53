"""Batches, detectors and steps that benchmarks have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.side_by_side import Scale
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import OptimisationConfig, Precision, SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.engine.graphs import StepGraphs, whole_pass
from d3etr.engine.optimiser import build_optimiser, clip_gradients
from d3etr.structures import ImageBatch, Targets

CLASSES = 80
OBJECTS = 7
"""Of an image, about COCO's mean."""
CLIP_NORM = 0.1


def random_batch(
    scale: Scale, objects: int = OBJECTS, classes: int = CLASSES
) -> tuple[ImageBatch, Targets]:
    """Square images of noise with random objects, on the scale's device."""
    generator = torch.Generator().manual_seed(0)
    count, side = scale.batch, scale.image
    pixels = torch.randn(count, 3, side, side, generator=generator)
    boxes = torch.rand(count, objects, 4, generator=generator) * 0.4 + 0.2
    labels = torch.randint(classes, (count, objects), generator=generator)
    ids = tuple(range(count))
    targets = Targets(
        labels,
        boxes,
        (objects,) * count,
        ids,
        ((side, side),) * count,
        torch.full((count,), objects),
    )
    return ImageBatch(pixels).to(scale.device), targets.to(scale.device)


def detector_config(scale: Scale, backbone: str, **changes: Any) -> DetectorConfig:
    """Conditional DETR of the papers' size: 256 channels, six layers, eight heads."""
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "feedforward": 64} if scale.smoke else {}
    return DetectorConfig.parse(
        {
            "name": "conditional_detr",
            "backbone": {"name": backbone},
            "queries": scale.queries,
            **sizes,
            **changes,
        }
    )


def random_detector(
    scale: Scale, backbone: str, seed: int, classes: int = CLASSES, **changes: Any
) -> DetectionTransformer:
    """A detector with random weights, on the scale's device."""
    torch.manual_seed(seed)
    detector = build_detector(detector_config(scale, backbone, **changes), classes)
    return detector.to(scale.device)


class Step:
    """A training step of a distiller on one batch, as the loop makes it.

    Args:
        student: is trained.
        teacher: None for a plain step.
        scale: its precision.
        batch: images and targets.
        distillation: settings; D3ETR's defaults where there is a teacher.
        teacher_precision: None: the scale's.
        graphs: replay CUDA graphs.
    """

    def __init__(
        self,
        student: DetectionTransformer,
        teacher: DetectionTransformer | None,
        scale: Scale,
        batch: tuple[ImageBatch, Targets],
        distillation: dict[str, Any] | None = None,
        teacher_precision: torch.dtype | None = None,
        graphs: bool = False,
    ) -> None:
        method = {"method": "none" if teacher is None else "d3etr"}
        config = MethodConfig.parse(method | (distillation or {}))
        criterion = SetCriterionConfig.model_validate({**student.config.criterion_defaults})
        self.distiller = Distiller(student.train(), teacher, config, criterion, seed=0)
        self.distiller.to(scale.device)
        self.optimiser: AdamW = build_optimiser(
            self.distiller, student.backbone, OptimisationConfig(epochs=1)
        )
        self._batch, self._scale = batch, scale
        self._teaching = replace(scale, precision=teacher_precision or scale.precision)
        self._graphs = self._recorder() if graphs else None

    def __call__(self) -> Tensor:
        """Forward, criterion, backward, clipping, update; returns the loss."""
        loss = self._pass() if self._graphs is None else self._replay(self._graphs)
        clip_gradients(self.optimiser, CLIP_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    def _recorder(self) -> StepGraphs:
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        precisions = (_name(part.precision) for part in (self._teaching, self._scale))
        run = whole_pass(self.distiller, self._scale.device, *precisions)
        return StepGraphs(run, parameters, self._scale.device)

    def _replay(self, graphs: StepGraphs) -> Tensor:
        losses = graphs(*self._batch, 1.0, lambda: None, distils=True)
        return torch.stack([*losses.values()]).sum()

    def _pass(self) -> Tensor:
        images, targets = self._batch
        with autocast(self._teaching):
            taught = self.distiller.run_teacher(images)
        normalisers = self.distiller.normalisers(targets, taught)
        with autocast(self._scale):
            losses = self.distiller(images, targets, taught, normalisers)
        loss = torch.stack([*losses.values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _name(precision: torch.dtype) -> Precision:
    return "float32" if precision == torch.float32 else "bfloat16"


class Replayed:
    """An action without gradients, recorded as a CUDA graph and replayed.

    Args:
        action: always does the same.
    """

    def __init__(self, action: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for _ in range(2):
                action()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            action()

    def __call__(self) -> None:
        """Replay it."""
        self._graph.replay()


def autocast(scale: Scale) -> torch.autocast:
    """The scale's precision."""
    reduced = scale.precision != torch.float32
    return torch.autocast(scale.device.type, scale.precision if reduced else None, enabled=reduced)
