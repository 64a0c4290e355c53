"""From weights of others to one file of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3etr.config.backbone import BackboneConfig
from d3etr.config.backbones import RESNET_VD, TIMM, TORCHVISION
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.detectors.imports import files
from d3etr.detectors.imports.categories import Categories, choose_rows, slots_of
from d3etr.detectors.imports.files import Found
from d3etr.detectors.imports.layouts import (
    LAYOUTS,
    official_detector,
    rename,
    rename_backbone,
)
from d3etr.detectors.imports.preprocessing import (
    in_words,
    preprocessing_of,
    published_preprocessing,
)
from d3etr.detectors.imports.settings import Unseen, from_args, from_config, infer_detector
from d3etr.detectors.torchvision_backbone import build_network
from d3etr.detectors.torchvision_weights import from_torchvision, weights_of, without_classifier
from d3etr.detectors.weights import (
    WeightsInfo,
    file_digest,
    load_strictly,
    load_weights,
    read_tensors,
    save_weights,
    write_tensors,
)
from d3etr.errors import UserError

_OPTIONS = ("heads", "dilation", "temperature", "activation", "sampling")
"""What a user may say of a checkpoint without ``args``."""
_OF_KINDS = {
    "temperature": ("dab_detr", "dino"),
    "activation": ("d_fine", "deimv2"),
    "sampling": ("rt_detr",),
}
"""Those of them that not every detector has."""
_FIRST_NAMES = ("conv1.", "features.", "layers.", "stem.")
"""How the first tensor of torchvision's networks is called."""
_DEEP_STEM = "conv1.6.weight"
"""A tensor of ResNet-vd alone."""
_WITHOUT_SMOOTHING = "RfDetrImageProcessor"
"""Hugging Face's image processor that resizes without antialiasing."""


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


@dataclass(frozen=True)
class _Theirs:
    """A detector of others: what it was, for people; our name of it; the rest from its files.

    ``args`` are those of an official checkpoint.
    """

    kind: str
    name: str
    found: Found
    unseen: Unseen
    box_refinement: bool | None = None
    names: Mapping[Any, Any] | None = None
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    args: Mapping[str, Any] | None = None


def import_weights(
    source: Path,
    target: Path,
    options: Unseen | None = None,
    categories: Categories | None = None,
    backbone: BackboneConfig | None = None,
) -> Imported:
    """Write weights of others as a file that everything here takes, whole or not at all.

    Args:
        source: an official checkpoint or torchvision's (``.pth``), a folder of Hugging Face's, or
            a file of ours.
        target: the file to write.
        options: what the user knows of a checkpoint whose tensors do not show it.
        categories: (id, name) of each category, by rising id, if the user names them.
        backbone: of timm's, or a ResNet-vd, whose file (``.safetensors`` or ``.pth``) the source
            is.

    Raises:
        UserError: unknown, damaged or unsafe files; tensors that are missing, left over or of
            another shape; options that have no effect.
    """
    given = {key: value for key in _OPTIONS if (value := getattr(options, key, None)) is not None}
    named = {} if categories is None else {"categories": categories}
    if backbone is not None:
        _refuse(source, given | named, "it is a backbone")
        return _import_backbone(source, target, _tensors_of(source), backbone)
    if source.is_dir():
        _refuse(source, given, f"{files.CONFIG} says it")
        return _import_detector(source, target, _from_folder(source), categories)
    if source.suffix == ".safetensors":
        if (source.parent / files.CONFIG).is_file():
            raise UserError(
                f"{source}: part of a folder of Hugging Face's: give the folder, {source.parent}"
            )
        _refuse(source, given | named, "a file of d3etr says all of it")
        detector, info = load_weights(source)
        notes = ["checked and copied; it could be used as it is"]
        return _write(source, target, "a weights file of d3etr", detector, info, notes)
    found = files.read_checkpoint(source)
    name = official_detector(found.tensors)
    if name is not None:
        theirs = _from_checkpoint(source, found, name, given)
        return _import_detector(source, target, theirs, categories)
    network = recognise(found.tensors)
    if network is None:
        raise UserError(_unknown(source, found.tensors))
    _refuse(source, given | named, "it is a backbone")
    return _import_backbone(source, target, found.tensors, BackboneConfig(name=network))


def _tensors_of(source: Path) -> Mapping[str, Tensor]:
    if source.suffix == ".safetensors":
        return read_tensors(source)
    return files.read_checkpoint(source).tensors


def _refuse(source: Path, options: Mapping[str, Any], why: str) -> None:
    if options:
        names = " and ".join(f"--{name}" for name in options)
        raise UserError(f"{source}: {names} would have no effect: {why}. Leave it out")


def _unknown(source: Path, tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("mask_head.") for name in tensors):
        return f"{source}: a detector of masks (panoptic); expected one of boxes alone"
    names = ", ".join(list(tensors)[:4])
    return (
        f"{source}: {len(tensors)} tensors ({names}, ...) of no known detector. Expected an "
        f"official checkpoint of {', '.join(LAYOUTS)}, one of torchvision's networks that "
        "are backbones here, a folder of Hugging Face's, or a weights file of d3etr"
    )


def _from_folder(source: Path) -> _Theirs:
    found = files.read_folder(source)
    config = found.settings
    name, unseen = from_config(config, f"{source}: {files.CONFIG}")
    return _Theirs(
        f"Hugging Face's {config['model_type']}",
        name,
        found,
        unseen,
        bool(config.get("with_box_refine")),
        config.get("id2label"),
        preprocessing_of(found.preprocessing, f"{source}: {files.PREPROCESSING}")
        if found.preprocessing
        else LAYOUTS[name].preprocessing,
    )


def _from_checkpoint(source: Path, found: Found, name: str, given: dict[str, Any]) -> _Theirs:
    """An official checkpoint; asks where a default would be a guess that spoils detections."""
    for key, kinds in _OF_KINDS.items():
        if name not in kinds and key in given:
            _refuse(source, {key: given[key]}, f"{name} has no such setting")
    if "dilation" in given and LAYOUTS[name].backbone is not None:
        _refuse(source, {"dilation": given["dilation"]}, f"{name} has no such setting")
    unseen = from_args(found.settings, name, str(source))
    for key, value in given.items():
        if getattr(unseen, key) not in (None, value):
            raise UserError(
                f"{source}: its args say {key} {getattr(unseen, key)}, but --{key} says {value}"
            )
    if "sampling" in given:
        given = given | {"own": unseen.own | {"sampling": given["sampling"]}}
    unseen = unseen.model_copy(update=given)
    if name == "rt_detr" and unseen.sampling is None and "dsp" in source.name.lower():
        raise UserError(
            f"{source}: named like an RT-DETRv2 with discrete sampling (dsp), which weights do not "
            "show: say --sampling discrete or bilinear"
        )
    if unseen.dilation is None and "dc5" in source.name.lower():
        raise UserError(
            f"{source}: named like a detector with dilation (DC5), which weights do not show: say "
            "--dilation or --no-dilation"
        )
    if name == "d_fine" and unseen.activation is None and "deim" in source.name.lower():
        raise UserError(
            f"{source}: named like DEIM's, whose code has silu where D-FINE's has relu, which "
            "weights do not show: say --activation silu or relu"
        )
    if name == "dab_detr" and unseen.dilation and unseen.temperature is None:
        raise UserError(
            f"{source}: the temperature of a dilated DAB-DETR's position encoding is 20, or 10 "
            "(official R50-DC5), which weights do not show: say --temperature 20 or 10"
        )
    kind, pixels = f"an official checkpoint of {name}", LAYOUTS[name].preprocessing
    return _Theirs(kind, name, found, unseen, preprocessing=pixels, args=found.settings)


def _import_detector(
    source: Path, target: Path, theirs: _Theirs, named: Categories | None
) -> Imported:
    """Our detector with their weights, and what to know about it."""
    layout, pixels, assumed = LAYOUTS[theirs.name], theirs.preprocessing, list[str]()
    softmax = layout.softmax
    try:
        tensors = rename(
            theirs.found.tensors,
            theirs.name,
            box_refinement=theirs.box_refinement,
            shared_box_head=theirs.found.settings.get("share_bbox_head"),
        )
        own = theirs.unseen.own | layout.told(theirs.found.tensors)
        if theirs.args is not None and layout.official is not None:
            said, pixels, assumed = layout.official(theirs.args, tensors)
            heads = theirs.unseen.heads
            own |= said | ({} if heads is None else {"heads": heads})
        known = {"own": own, "heads": own.get("heads", theirs.unseen.heads)}
        unseen = theirs.unseen.model_copy(update=known)
        config, notes = infer_detector(theirs.name, tensors, unseen)
    except ValueError as error:
        raise UserError(f"{source}: {error}: copy it again") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if theirs.args is None and not theirs.found.preprocessing:
        pixels = published_preprocessing(config, pixels)
        assumed = [f"no {files.PREPROCESSING}: assumed images of {in_words(pixels)}"]
    notes += assumed + _leave_unread(tensors, config)
    if theirs.found.preprocessing.get("image_processor_type") == _WITHOUT_SMOOTHING:
        notes.append("its image processor does not smooth what it shrinks; here it is smoothed")
    try:
        outputs = _outputs(tensors) - softmax
        categories, used = slots_of(outputs, named, theirs.names, layout.coco)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    unused = choose_rows(tensors, used, outputs, softmax, config.proposals_tell_classes)
    if softmax:
        changes = {"classification": "softmax", "unused_outputs": unused}
        config = DetectorConfig.parse(config.model_dump(mode="json") | changes)
    if unused:
        fate = "take part in the softmax only" if softmax else "were left out"
        notes.append(f"{unused} outputs that belong to no category {fate}")
    detector = build_detector(config, len(categories)).eval()
    load_strictly(detector, tensors, str(source))
    digests = {file.name: file_digest(file) for file in theirs.found.files}
    info = WeightsInfo(
        detector=config,
        categories=categories,
        preprocessing=pixels,
        origin={"imported": {"kind": theirs.kind, "files": digests, "torch": torch.__version__}},
    )
    return _write(source, target, theirs.kind, detector, info, notes)


def _leave_unread(tensors: dict[str, Tensor], config: DetectorConfig) -> list[str]:
    """Take out what nothing of the detector reads, and say so."""
    names = LAYOUTS[config.name].unread(tensors, config.backbone.vit.blocks)
    for name in names:
        del tensors[name]
    if not names:
        return []
    return [
        f"{len(names)} tensors of the backbone behind the last features that are read were left out"
    ]


def _outputs(tensors: Mapping[str, Tensor]) -> int:
    for name in ("class_head.bias", "decoder.class_heads.0.bias"):
        if name in tensors:
            return len(tensors[name])
    raise UserError("no class head: expected a whole detector")


def _write(
    source: Path,
    target: Path,
    kind: str,
    detector: DetectionTransformer,
    info: WeightsInfo,
    notes: list[str],
) -> Imported:
    save_weights(target, detector, info)
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


def recognise(tensors: Mapping[str, Tensor]) -> str | None:
    """The network whose backbone has exactly these tensors, beside any classifier.

    One of torchvision's, or a ResNet-vd by official names or timm's.
    """
    if not next(iter(tensors), "").startswith(_FIRST_NAMES):
        return None
    tensors = rename_backbone(tensors)
    if _DEEP_STEM in tensors:
        return next((name for name in RESNET_VD if _is_resnet_vd(name, tensors)), None)
    size = sum(tensor.numel() for tensor in tensors.values())
    shapes = _shapes(tensors)
    # The number of parameters only decides which one is tried first.
    for name in sorted(TORCHVISION, key=lambda x: abs(weights_of(x).meta["num_params"] - size)):
        with torch.device("meta"):
            if _shapes(build_network(name).state_dict()) == shapes:
                return name
    return None


def _is_resnet_vd(name: str, tensors: Mapping[str, Tensor]) -> bool:
    with torch.device("meta"):
        expected = _shapes(build_network(name).state_dict())
    return _shapes(from_torchvision(name, tensors)) == expected


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in without_classifier(tensors).items()}


def _import_backbone(
    source: Path, target: Path, tensors: Mapping[str, Tensor], config: BackboneConfig
) -> Imported:
    """A network's file as ``student.backbone_weights`` takes it."""
    network, of_timm = build_backbone(config), config.name.startswith(TIMM)
    kind = "a ResNet-vd" if config.name in RESNET_VD else "a torchvision network"
    if of_timm:
        from d3etr.detectors.timm_weights import from_timm  # importing timm takes two seconds

        tensors = from_timm(network, rename_backbone(tensors))
    else:
        tensors = from_torchvision(config.name, rename_backbone(tensors))
    load_strictly(network, tensors, str(source))
    metadata = {"backbone": config.model_dump_json(), "source": source.name}
    write_tensors(target, network.state_dict(), metadata)
    return Imported(
        source=source,
        target=target,
        kind="a network of timm" if of_timm else kind,
        network=config.name,
        architecture=config.model_dump(mode="json"),
        categories=(),
        tensors=len(tensors),
        parameters=count_parameters(network),
        preprocessing=None,
        notes=("its classifier is left out; give the file as student.backbone_weights",),
    )
