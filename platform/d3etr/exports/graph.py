"""A detector as one graph: pixels to boxes in pixels, scores and labels.

Shapes: B images · N queries · C classes · K detections.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from d3etr.config.data import PreprocessingConfig
from d3etr.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, STD_FLOOR
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.evaluation.postprocess import relative_detections
from d3etr.exports.gathers import gather_bilinear, sampling_modules
from d3etr.structures import ImageBatch

Sampling = Literal["grid-sample", "gather"]
LARGEST_SIDE = 2**15


@dataclass(frozen=True)
class GraphSettings:
    """What of an exported graph is a choice.

    Attributes:
        inside: the graph normalises uint8 pixels; else it takes normalised float32 ones.
        size: (height, width) in pixels of all images; None: that of the weights' preprocessing if
            it is exact, else any.
        detections: K.
        sampling: how values at sampled places are read; None: what is faster in the runtime.
    """

    inside: bool = True
    size: tuple[int, int] | None = None
    detections: int = 300
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Traced:
    """A detector's graph.

    Attributes:
        program: takes images [B, 3, h, w] and sizes [B, 2] int64 (height, width) in pixels of the
            images before they were resized; returns boxes [B, K, 4] as x1, y1, x2, y2 in those
            pixels, scores [B, K] in descending order and labels [B, K] int64.
        example: its two inputs.
        size: (height, width) of images, or None: any.
        smallest: shortest side in pixels that it takes.
        detections: K.
        sampling: how values are sampled, ``none`` where nothing is.
    """

    program: ExportedProgram
    example: tuple[Tensor, Tensor]
    size: tuple[int, int] | None
    smallest: int
    detections: int
    sampling: str


class DetectionGraph(nn.Module):
    """Normalisation, detector and choice of detections.

    Args:
        detector: in evaluation mode.
        preprocessing: its normalisation is part of the graph; None: images are normalised.
        detections: K.
    """

    def __init__(
        self,
        detector: DetectionTransformer,
        preprocessing: PreprocessingConfig | None,
        detections: int,
    ) -> None:
        super().__init__()
        self.detector, self.detections = detector, detections
        self.normalisation = None if preprocessing is None else preprocessing.normalisation
        for name, values in (("mean", IMAGENET_MEAN), ("deviation", IMAGENET_STD)):
            scaled = torch.tensor(values)[:, None, None] * 255
            self.register_buffer(name, scaled, persistent=False)

    mean: Tensor
    deviation: Tensor

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [B, K, 4], scores [B, K] and labels [B, K]; arguments as of ``Traced``."""
        memory = self.detector.encode(ImageBatch(self._normalised(images)))
        [outputs] = self.detector.decode(memory, [self.detector.object_queries(memory)])
        scores, labels, corners = relative_detections(outputs, self.detections)
        pixels = sizes.flip(1).repeat(1, 2)[:, None].to(corners.dtype)
        return corners * pixels, scores, labels

    def _normalised(self, images: Tensor) -> Tensor:
        """As ``data.transforms.normalise``, of a batch without padding."""
        if self.normalisation is None:
            return images
        values = images.float()
        if self.normalisation == "unit":
            return values / 255
        if self.normalisation == "imagenet":
            return (values - self.mean) / self.deviation
        flat = values.flatten(2)
        flat = flat - flat.mean(2, keepdim=True)
        deviation = flat.square().mean(2, keepdim=True).sqrt()
        return (flat / (deviation + STD_FLOOR * 255)).view(values.shape)


def trace(
    detector: DetectionTransformer,
    info: WeightsInfo,
    settings: GraphSettings,
    few_by_gathers: bool = False,
) -> Traced:
    """A detector's graph, of what detecting takes: parts for training alone are left out.

    The batch's size is free. So is the images' where the preprocessing does not fix it.

    Args:
        detector: in evaluation mode on the CPU; it stays as it is.
        info: describes it.
        settings: of the graph.
        few_by_gathers: as of ``formats.GraphFormat``, where the settings leave it open.

    Raises:
        UserError: the graph would hold for images of one size only, and none is given.
    """
    detector = copy.deepcopy(detector).eval().requires_grad_(False)
    sampling = _set_sampling(detector, settings.sampling, few_by_gathers)
    graph = DetectionGraph(
        detector,
        info.preprocessing if settings.inside else None,
        most_detections(info, settings.detections),
    )
    size = settings.size or info.preprocessing.exact_size
    stride = detector.level_strides[-1]
    height, width = size or (5 * stride + stride // 4, 7 * stride + stride // 4)
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    example = (
        images if settings.inside else images / 255,
        torch.tensor([[480, 640], [300, 500]]),
    )
    images_shape: dict[int, Dim] = {0: Dim("batch", min=1)}
    if size is None:
        images_shape[2] = Dim("height", min=2 * stride, max=LARGEST_SIDE)
        images_shape[3] = Dim("width", min=2 * stride, max=LARGEST_SIDE)
    shapes = {"images": images_shape, "sizes": {0: images_shape[0]}}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
        if size is None:
            _ensure_free(program, 2 * stride, settings.inside)
    except Exception as error:  # the exporter has errors of many types
        raise _refusal(info, size, error) from error
    return Traced(program, example, size, min(size or (2 * stride,)), graph.detections, sampling)


def _ensure_free(program: ExportedProgram, smallest: int, inside: bool) -> None:
    """Evaluate what the graph assumes about sizes; runtimes would not notice.

    Raises:
        AssertionError: an assumption that images of some sizes or batches break.
    """
    check = getattr(program.module(), "_guards_fn", None)
    if check is None:
        return
    one = torch.zeros(1, dtype=torch.uint8 if inside else torch.float32)
    for height in (smallest, 333, 1333):
        for width in (smallest + 3, 800, 4096):
            for count in (1, 5):
                images = one.expand(count, 3, max(height, smallest), max(width, smallest))
                check(images, torch.ones(count, 2, dtype=torch.int64))


def most_detections(info: WeightsInfo, wanted: int) -> int:
    """K at most of those wanted: DETR's softmax gives each query one class."""
    each = 1 if info.detector.softmax_classes else len(info.categories)
    return min(wanted, info.detector.queries * each)


def _set_sampling(
    detector: DetectionTransformer, sampling: Sampling | None, few_by_gathers: bool
) -> str:
    modules = sampling_modules(detector)
    if sampling is None:
        few = not sampling_modules(getattr(detector, "encoder", nn.Identity()))
        sampling = "gather" if few and few_by_gathers else "grid-sample"
    if sampling == "gather":
        for module in modules:
            module.sample = gather_bilinear
    return sampling if modules else "none"


def _refusal(info: WeightsInfo, size: tuple[int, int] | None, error: Exception) -> UserError:
    kind = f"'{info.detector.name}' over '{info.detector.backbone.name}'"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if size is None:
        return UserError(
            f"{kind} cannot be exported for images of any size: its graph would be right for one "
            f"size only ({reason}). Fix it with --size HEIGHT WIDTH, which images are stretched "
            "to, or train with data.preprocessing.exact_size"
        )
    return UserError(f"{kind} cannot be exported: {reason}")
