"""Exporting a detector: trace, write, run, compare; what differs is not kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import d3etr
from d3etr.config.data import PreprocessingConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.transforms import normalise
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.evaluation.postprocess import top_detections
from d3etr.exports.comparison import Comparison, Detected, compare
from d3etr.exports.description import Description, ImageSettings
from d3etr.exports.formats import GraphFormat, Runner, require_package
from d3etr.exports.graph import GraphSettings, Traced, most_detections, trace
from d3etr.exports.pictures import PictureBatch, picture_batches
from d3etr.files import sync_folder, temporary_beside
from d3etr.progress import OnProgress, no_progress
from d3etr.structures import ImageBatch

_EVALUATION = ("split", "data_digest", "mAP")
"""Of what a weights file says about its quality, what an export repeats."""
SPARE = 50
"""Further detections of the detector's, which rounding may put among those of the file."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        description: what the file says about itself.
        comparison: with the detector, over pictures of several sizes.
    """

    description: Description
    comparison: Comparison


def export_graph(
    path: Path,
    detector: DetectionTransformer,
    info: WeightsInfo,
    settings: GraphSettings,
    kind: GraphFormat,
    pictures: Sequence[Path] = (),
    on_progress: OnProgress = no_progress,
) -> Export:
    """Write a detector's graph, whole, and only if it detects what the detector does.

    Args:
        path: where to; its folder is made.
        detector: in evaluation mode on the CPU.
        info: describes it.
        settings: of the graph.
        kind: of file.
        pictures: to compare by; none: photographs that scikit-learn brings.
        on_progress: told which step is at work.

    Raises:
        UserError: a package is missing, the graph cannot be had, is of another number of
            detections or differs from the detector, or the file cannot be written.
    """
    for package in kind.packages:
        require_package(package, kind.name)
    on_progress("tracing")
    traced = trace(detector, info, settings, kind.few_by_gathers)
    description = _describe(info, settings, kind, traced)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_files(path) as temporary:
            on_progress(f"writing {kind.name}")
            kind.write(traced, description, temporary)
            on_progress("comparing with the detector")
            found = _compare(kind.open(temporary), detector, info, traced, settings, pictures)
            _require_equal(found, kind, info, traced)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free some space, or choose "
            "another place"
        ) from error
    return Export(description, found)


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """A place to write ``path`` to, and files beside it; all replace what is there at the end."""
    folder = temporary_beside(path)
    folder.mkdir()
    try:
        yield folder / path.name
        # The file that was asked for comes last: whoever sees it sees the others.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, path.with_name(file.name))
        sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_equal(found: Comparison, kind: GraphFormat, info: WeightsInfo, traced: Traced) -> None:
    if not found.images:
        raise UserError(
            f"no picture is as large as the graph takes, {traced.smallest} pixels: give larger "
            "--pictures"
        )
    if not found.equal:
        raise UserError(
            f"the {kind.name} file is not kept, because it detects something else than the "
            f"{info.detector.name} does in PyTorch: in {found.images} pictures, {found}. Try "
            "--sampling, another --opset or other --pictures, and report it"
        )


def _compare(
    run: Runner,
    detector: DetectionTransformer,
    info: WeightsInfo,
    traced: Traced,
    settings: GraphSettings,
    pictures: Sequence[Path],
) -> Comparison:
    total = Comparison()
    shown = picture_batches(info.preprocessing, traced.size, pictures)
    for batch in _large_enough(shown, traced.smallest):
        normalised = torch.stack([normalise(x, info.preprocessing) for x in batch.pixels])
        expected = _eager(detector, normalised, batch, traced.detections + SPARE)
        images = batch.pixels if settings.inside else normalised
        found = run(images.numpy(), np.array(batch.sizes, dtype=np.int64))
        total += compare(expected, found, batch.sizes)
    return total


def _large_enough(batches: Iterator[PictureBatch], smallest: int) -> Iterator[PictureBatch]:
    return (batch for batch in batches if min(batch.pixels.shape[-2:]) >= smallest)


@torch.no_grad()
def _eager(
    detector: DetectionTransformer, pixels: torch.Tensor, batch: PictureBatch, maximum: int
) -> Detected:
    memory = detector.encode(ImageBatch(pixels))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    scores, labels, boxes = top_detections(outputs, batch.sizes, maximum)
    return Detected(boxes.numpy(), scores.numpy(), labels.numpy())


def _describe(
    info: WeightsInfo, settings: GraphSettings, kind: GraphFormat, traced: Traced
) -> Description:
    preprocessing = info.preprocessing
    if settings.size is not None:
        preprocessing = PreprocessingConfig(
            normalisation=preprocessing.normalisation, exact_size=settings.size
        )
    versions: dict[str, Any] = {"d3etr": d3etr.__version__, "torch": torch.__version__}
    versions |= {name: require_package(name, kind.name).__version__ for name in kind.packages}
    return Description(
        detector=info.detector.name,
        names=tuple(name for _, name in info.categories),
        category_ids=tuple(number for number, _ in info.categories),
        preprocessing=ImageSettings(
            preprocessing.normalisation,
            preprocessing.shortest_side,
            preprocessing.longest_side,
            preprocessing.exact_size,
        ),
        inside=settings.inside,
        size=traced.size,
        smallest=traced.smallest,
        detections=traced.detections,
        threshold=info.threshold,
        sampling=traced.sampling,
        opset=kind.opset,
        exporter=versions,
        evaluation=_evaluation(info, settings, traced),
    )


def _evaluation(info: WeightsInfo, settings: GraphSettings, traced: Traced) -> dict[str, Any]:
    """That of the weights, where the file is shown images as they were and may answer as much."""
    other_size = settings.size not in (None, info.preprocessing.exact_size)
    measured = most_detections(info, EvaluationConfig().maximum_detections)
    if other_size or traced.detections < measured:
        return {}
    found = info.evaluation or {}
    return {name: found[name] for name in _EVALUATION if name in found}
