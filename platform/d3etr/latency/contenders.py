"""What is measured: a weights file, eager or compiled, in a precision; others in ``exported``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from d3etr.config.location import Location
from d3etr.errors import UserError
from d3etr.exports.graph import DetectionGraph
from d3etr.inference import Predictor, load

PRECISIONS: Mapping[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DETECTIONS = 100
"""Of an image, at most."""


@dataclass(frozen=True)
class Way:
    """How a detector is run.

    Attributes:
        precision: one of ``PRECISIONS``; below float32 by autocast.
        compiled: by ``torch.compile``.
        batch: images at once.
    """

    precision: str
    compiled: bool
    batch: int


Action = Callable[[], object]


@dataclass(frozen=True)
class Contender(ABC):
    """A file that is measured.

    Attributes:
        name: in tables.
        size: (height, width) that the detector is shown the picture in.
        evaluation: what the file says about its quality: split, data digest, mAP.
        parameters: how many numbers it has; None where nobody counts.
        operations: floating-point operations of one image, as PyTorch counts them, or None.
        file_bytes: size of what is shipped; None of a URL.
        network: digest of its architecture (``WeightsInfo.network``), or None.
    """

    name: str
    size: tuple[int, int]
    evaluation: Mapping[str, Any]
    parameters: int | None = None
    operations: int | None = None
    file_bytes: int | None = None
    network: str | None = None

    @abstractmethod
    def action(self, picture: Image.Image, way: Way) -> Action | None:
        """Detects in a batch of one picture.

        From resized uint8 pixels in the host's memory to detections there, whoever normalises and
        wherever that is done.

        None: this file does not run that way.
        """

    @abstractmethod
    def run_as(self, way: Way) -> str:
        """By what, in which precision."""


@dataclass(frozen=True)
class TorchContender(Contender):
    """A weights file in PyTorch.

    Attributes:
        predictor: of its weights.
        graph: the work of an exported file's graph.
    """

    predictor: Predictor = field(kw_only=True)
    graph: DetectionGraph = field(kw_only=True)

    @classmethod
    def read(
        cls, name: str, weights: Location, picture: Image.Image, device: str | None
    ) -> TorchContender:
        """From a file.

        Raises:
            UserError: it cannot be read, or there is no such device.
        """
        predictor = load(weights, device)
        predictor.detector.requires_grad_(False)  # PyTorch's counter hangs on what learns
        graph = DetectionGraph(predictor.detector, predictor.info.preprocessing, DETECTIONS)
        graph.to(predictor.device)
        images, sizes = _inputs(predictor, picture, 1)
        with FlopCounterMode(display=False) as counted:
            _detect(graph, images, sizes, predictor.device)
        return cls(
            name,
            (images.shape[-2], images.shape[-1]),
            predictor.info.evaluation or {},
            sum(parameter.numel() for parameter in predictor.detector.parameters()),
            counted.get_total_flops(),
            weights.stat().st_size if isinstance(weights, Path) else None,
            predictor.info.network,
            predictor=predictor,
            graph=graph,
        )

    def action(self, picture: Image.Image, way: Way) -> Action:
        """As of ``Contender``.

        Raises:
            UserError: the device has no such precision.
        """
        device, dtype = self.predictor.device, PRECISIONS[way.precision]
        if device.type == "cpu" and dtype == torch.float16:
            raise UserError(
                "--precisions float16 is for GPUs: a CPU has no fast operations in it; expected "
                "float32 or bfloat16"
            )
        images, sizes = _inputs(self.predictor, picture, way.batch)
        run: Callable[..., object] = torch.compile(_detect) if way.compiled else _detect

        def act() -> object:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                return run(self.graph, images, sizes, device)

        return act

    def run_as(self, way: Way) -> str:
        """Eager or compiled."""
        return f"{'compiled' if way.compiled else 'eager'} {way.precision}"


def _inputs(predictor: Predictor, picture: Image.Image, count: int) -> tuple[Tensor, Tensor]:
    """Uint8 [count, 3, height, width] of one picture, as the detector is shown it, and sizes."""
    pixels = predictor.prepared(picture).expand(count, -1, -1, -1).contiguous()
    return pixels, torch.tensor([[picture.height, picture.width]] * count)


@torch.no_grad()  # in inference mode PyTorch's compiler fails on views of weights
def _detect(
    graph: DetectionGraph, images: Tensor, sizes: Tensor, device: torch.device
) -> list[Tensor]:
    return [column.cpu() for column in graph(images.to(device), sizes.to(device))]


def made_picture(width: int, height: int) -> Image.Image:
    """An RGB picture of noise: what is on it costs no time, how large it is does."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def named(files: Sequence[Location]) -> dict[str, Location]:
    """Names of files, as short as tells them apart: of the file, with its suffix, of its folder.

    Raises:
        UserError: one file is named twice.
    """
    if len({str(file) for file in files}) < len(files):
        raise UserError("a file is named twice: expected different ones")
    found = dict[str, Location]()
    for file in files:
        parts = Path(str(file)).with_suffix("").parts
        of_run = parts[-1] == "weights" and len(parts) > 1
        name, kept = (parts[-2], 2) if of_run else (parts[-1], 1)
        suffix = Path(str(file)).suffix
        if name in found and Path(str(found[name])).suffix != suffix:
            name += suffix
        while name in found and kept < len(parts):
            kept += 1
            name = "/".join(parts[-kept:])
        found[name] = file
    return found
