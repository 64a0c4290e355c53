"""COCO evaluation of a detector over all workers, no image counted twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d3etr.config.data import DataConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.loading import EvaluationBatches
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.base import DetectionTransformer
from d3etr.evaluation.coco_metrics import CocoMetrics, GroundTruth, SplitDetections
from d3etr.evaluation.postprocess import top_detections
from d3etr.structures import DecoderOutputs, ImageBatch, Targets, on_device
from d3etr.timing import PhaseTimer

Observer = Callable[[ImageBatch, Targets, DecoderOutputs], None]
"""Called with each batch of an evaluation and the detector's outputs for it."""


class Workers(Protocol):
    """The processes that share an evaluation; a training context is one."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, in place; returns the same tensor."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every worker's tensor at rank 0 (first dimensions may differ), None elsewhere."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One measurement of a detector on one split.

    Attributes:
        mAP: fraction in [0, 1], known to every worker; None if the split holds no objects.
        metrics: all of COCO's; at rank 0 only.
        images_per_second: of one worker's detector alone: forward pass and choice of
            detections, without loading images.
        seconds: wall time of the whole evaluation.
        threshold: score above which detections have the highest F1 at IoU 0.5; at rank 0, None
            where none is right.
    """

    mAP: float | None
    metrics: CocoMetrics | None
    images_per_second: float
    seconds: float
    threshold: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Name -> value of COCO's metrics; empty away from rank 0."""
        return {} if self.metrics is None else self.metrics.as_dict()


class Evaluator:
    """Measures detectors on one split.

    Args:
        split: images and annotations.
        data: preprocessing and loading.
        config: batch size and detections per image.
        workers: those that share the images.
        image_scale: a factor on the sides of the images.
    """

    def __init__(
        self,
        split: DetectionSplit,
        data: DataConfig,
        config: EvaluationConfig,
        workers: Workers,
        image_scale: float = 1.0,
    ) -> None:
        self.split = split
        self._workers = workers
        self._maximum = config.maximum_detections
        self._batches = EvaluationBatches(
            split,
            data,
            batch_size=config.batch_size,
            rank=workers.rank,
            world_size=workers.world_size,
            image_scale=image_scale,
        )
        self._truth: GroundTruth | None = None

    def measure(
        self, detector: DetectionTransformer, observe: Observer | None = None
    ) -> Evaluation:
        """Evaluate in float32; the detector's mode (training or not) is restored.

        Args:
            detector: on this worker's device.
            observe: sees every batch of this worker.
        """
        begin = time.perf_counter()
        training = detector.training
        detector.eval()
        try:
            rows, speed = self._detect_all(detector, observe)
        finally:
            self._batches.close()
            detector.train(training)
        parts = self._workers.gather(rows)
        metrics, threshold = None, None
        if parts is not None:
            detections = _as_detections(torch.cat([part.cpu() for part in parts]))
            metrics = self._known_truth().measure(detections, self._maximum)
            best = self._known_truth().best_threshold(detections, self._maximum)
            threshold = None if best is None else best[0]
        mAP = self._share(None if metrics is None else metrics.values["mAP"])
        return Evaluation(mAP, metrics, speed, time.perf_counter() - begin, threshold)

    def detect(self, detector: DetectionTransformer) -> SplitDetections:
        """What a detector finds in the whole split; for a world of one worker."""
        rows, _ = self._detect_all(detector.eval(), None)
        self._batches.close()
        return _as_detections(rows.cpu())

    @torch.no_grad()
    def _detect_all(
        self, detector: DetectionTransformer, observe: Observer | None
    ) -> tuple[Tensor, float]:
        """``_rows`` of this worker's images, [n, 7], and images per second."""
        device = self._workers.device
        timer = PhaseTimer(device)
        found = [torch.zeros(0, 7, dtype=torch.int64, device=device)]
        images_seen = 0
        for number, batch in enumerate(self._batches):
            images, targets = batch[0].to(device), batch[1].to(device)
            if number == 1:  # the first batch, which warms up, only counts if it is the only one
                timer.take()
                images_seen = 0
            with timer.phase("forward"):
                memory = detector.encode(images)
                (outputs,) = detector.decode(memory, [detector.object_queries(memory)])
                found.append(_rows(outputs, targets, self._maximum))
            images_seen += len(targets.image_ids)
            if observe is not None:
                observe(images, targets, outputs)
        return torch.cat(found), images_seen / max(timer.take().get("forward", 0.0), 1e-9)

    def _known_truth(self) -> GroundTruth:
        if self._truth is None:
            self._truth = GroundTruth(self.split)
        return self._truth

    def _share(self, mAP: float | None) -> float | None:
        """Rank 0's value for all; a negative number stands for None on the way."""
        known = mAP if mAP is not None else -1.0
        value = torch.tensor(
            known if self._workers.rank == 0 else 0.0,
            dtype=torch.float64,
            device=self._workers.device,
        )
        shared = float(self._workers.all_reduce(value))
        return shared if shared >= 0 else None


def _rows(outputs: DecoderOutputs, targets: Targets, maximum: int) -> Tensor:
    """[B * K, 7] int64: image id, label, and the bits of float64 score, x1, y1, x2, y2 in pixels.

    An id has up to 63 bits, which no float holds.
    """
    scores, labels, boxes = top_detections(outputs, targets.original_sizes, maximum)
    ids = on_device(torch.tensor(targets.image_ids), labels.device)
    integers = torch.stack([ids[:, None].expand_as(labels), labels], -1)
    numbers = torch.cat([scores[..., None].double(), boxes.double()], -1)
    return torch.cat([integers, numbers.view(torch.int64)], -1).flatten(0, 1)


def _as_detections(rows: Tensor) -> SplitDetections:
    """Of ``_rows`` on the host."""
    numbers = rows[:, 2:].contiguous().view(torch.float64).numpy()
    ids, labels = rows[:, 0].numpy(), rows[:, 1].numpy()
    return SplitDetections(ids, labels, numbers[:, 0], numbers[:, 1:])
