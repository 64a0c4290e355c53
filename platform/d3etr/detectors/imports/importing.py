"""From weights of others to one file of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3etr.config.detector import BackboneConfig, DetectorConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.detectors.imports import official, reading
from d3etr.detectors.imports.architecture import infer_detector
from d3etr.detectors.imports.categories import choose_rows, slots_of
from d3etr.detectors.imports.reading import Found
from d3etr.detectors.imports.sources import (
    UNSEEN,
    Said,
    TheirDetector,
    from_checkpoint,
    from_folder,
)
from d3etr.detectors.imports.torchvision_networks import recognise
from d3etr.detectors.tensor_files import file_digest, load_strictly, write_tensors
from d3etr.detectors.torchvision_weights import from_torchvision
from d3etr.detectors.weights import WeightsInfo, load_weights, save_weights
from d3etr.errors import UserError

__all__ = ["Imported", "Said", "import_weights"]


@dataclass(frozen=True)
class Imported:
    """What was read and what was written.

    Attributes:
        source: what was read.
        target: the file that was written.
        kind: what the source is.
        network: name of the detector, or of the backbone.
        architecture: its configuration.
        categories: names of the classes; none for a backbone.
        tensors: number of tensors written.
        parameters: their numbers in total.
        preprocessing: what images go through; None for a backbone.
        notes: what had to be assumed, and what to know.
    """

    source: Path
    target: Path
    kind: str
    network: str
    architecture: dict[str, Any]
    categories: tuple[str, ...]
    tensors: int
    parameters: int
    preprocessing: dict[str, Any] | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        paths = {"source": str(self.source), "target": str(self.target)}
        return asdict(self) | paths | {"categories": [*self.categories], "notes": [*self.notes]}


def import_weights(source: Path, target: Path, said: Said) -> Imported:
    """Write weights of others as a file that everything here takes, whole or not at all.

    Args:
        source: an official checkpoint or torchvision's (``.pth``), a folder of Hugging Face's, or
            a file of ours.
        target: the file to write.
        said: about what the source does not say.

    Raises:
        UserError: unknown, damaged or unsafe files; tensors that are missing, left over or of
            another shape; options that have no effect.
    """
    if source.is_dir():
        return _import_detector(source, target, said, from_folder(source, said))
    if source.suffix == ".safetensors":
        return _copy_ours(source, target, said)
    found = reading.read_checkpoint(source)
    theirs = from_checkpoint(source, found, said)
    if theirs is not None:
        return _import_detector(source, target, said, theirs)
    network = recognise(found.tensors)
    if network is not None:
        return _import_backbone(source, target, said, found, network)
    raise UserError(_unknown(source, found.tensors))


def _unknown(source: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("mask_head.") for name in tensors):
        return f"{source}: a detector of masks (panoptic); expected one of boxes alone"
    names = ", ".join(list(tensors)[:4])
    return (
        f"{source}: {len(tensors)} tensors ({names}, ...) of no known detector. Expected an "
        f"official checkpoint of {', '.join(official.SCHEMES)}, one of torchvision's networks that "
        "are backbones here, a folder of Hugging Face's, or a weights file of d3etr"
    )


def _import_detector(source: Path, target: Path, said: Said, theirs: TheirDetector) -> Imported:
    detector, info, notes = _build(source, theirs, said)
    save_weights(target, detector, info)
    return _report(source, target, theirs.kind, detector, info, notes)


def _build(
    source: Path, theirs: TheirDetector, said: Said
) -> tuple[DetectionTransformer, WeightsInfo, list[str]]:
    """Our detector with their weights, and what to know about it."""
    tensors = dict(theirs.tensors)
    exclusive = theirs.name == "detr"  # all others were trained with a sigmoid for each class
    try:
        config, notes = infer_detector(theirs.name, tensors, theirs.unseen)
        slots = slots_of(_outputs(tensors) - exclusive, said.categories, theirs.names)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    choose_rows(tensors, slots, exclusive)
    unused = len(slots.unused)
    if exclusive:
        config = _exclusive(config, unused)
    if unused:
        fate = "take part in the softmax only" if exclusive else "were left out"
        notes.append(f"{unused} outputs that belong to no category {fate}")
    detector = build_detector(config, len(slots.categories)).eval()
    load_strictly(detector, tensors, str(source))
    digests = {file.name: file_digest(file) for file in theirs.files}
    origin = {"kind": theirs.kind, "files": digests, "torch": torch.__version__}
    info = WeightsInfo(
        detector=config,
        categories=slots.categories,
        preprocessing=theirs.preprocessing,
        origin={"imported": origin},
    )
    return detector, info, notes


def _exclusive(config: DetectorConfig, unused: int) -> DetectorConfig:
    changes = {"classification": "softmax", "unused_outputs": unused}
    return DetectorConfig.parse(config.model_dump(mode="json") | changes)


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    for name in ("class_head.bias", "decoder.class_heads.0.bias"):
        if name in tensors:
            return len(tensors[name])
    raise UserError("no class head: expected a whole detector")


def _import_backbone(source: Path, target: Path, said: Said, found: Found, name: str) -> Imported:
    """A torchvision network's file as ``student.backbone_weights`` takes it."""
    said.refuse(source, "it is a backbone", *UNSEEN, "categories")
    backbone = BackboneConfig(name=name)
    tensors = from_torchvision(name, found.tensors)
    network = build_backbone(backbone)
    load_strictly(network, tensors, str(source))
    metadata = {"backbone": backbone.model_dump_json(), "source": source.name}
    write_tensors(target, network.state_dict(), metadata)
    return Imported(
        source=source,
        target=target,
        kind="a torchvision network",
        network=name,
        architecture=backbone.model_dump(mode="json"),
        categories=(),
        tensors=len(tensors),
        parameters=count_parameters(network),
        preprocessing=None,
        notes=("its classifier is left out; give the file as student.backbone_weights",),
    )


def _copy_ours(source: Path, target: Path, said: Said) -> Imported:
    if (source.parent / reading.CONFIG).is_file():
        folder = source.parent
        raise UserError(f"{source}: part of a folder of Hugging Face's: give the folder, {folder}")
    said.refuse(source, "a file of d3etr says all of it", *UNSEEN, "categories")
    detector, info = load_weights(source)
    save_weights(target, detector, info)
    notes = ["checked and copied; it could be used as it is"]
    return _report(source, target, "a weights file of d3etr", detector, info, notes)


def _report(
    source: Path,
    target: Path,
    kind: str,
    detector: DetectionTransformer,
    info: WeightsInfo,
    notes: list[str],
) -> Imported:
    return Imported(
        source=source,
        target=target,
        kind=kind,
        network=info.detector.name,
        architecture=info.detector.model_dump(mode="json"),
        categories=tuple(name for _, name in info.categories),
        tensors=len(detector.state_dict()),
        parameters=count_parameters(detector),
        preprocessing=info.preprocessing.model_dump(mode="json"),
        notes=tuple(notes),
    )
