"""Pre-trained backbones that all detectors of a project start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from d3etr.config.backbone import BackboneConfig
from d3etr.config.location import Location
from d3etr.config.overrides import Tree
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.feature_levels import BACKBONE_LEVELS
from d3etr.detectors.weights import load_backbone_weights, read_metadata
from d3etr.errors import UserError
from d3etr.storage.fetch import local_file

FINEST_STRIDE = 8
"""Pixels of a cell of the finest map that detectors look at."""


@dataclass(frozen=True)
class BackboneStart:
    """A backbone's file of ImageNet weights.

    Attributes:
        weights: the file.
        name: of the network.
        strides: pixels per cell of the maps that a detector takes, finest first.
    """

    weights: Location
    name: str
    strides: tuple[int, ...]

    @property
    def tree(self) -> Tree:
        """``student``'s own values."""
        return {
            "detector": {"backbone": {"name": self.name}},
            "backbone_weights": str(self.weights),
        }


@dataclass(frozen=True)
class Backbones:
    """What teacher and students start from.

    Attributes:
        teacher: of the teacher.
        student: of students.
    """

    teacher: BackboneStart
    student: BackboneStart

    @property
    def same(self) -> bool:
        """Whether it is one network: students can take over the teacher's."""
        return self.teacher.name == self.student.name


def read_backbones(student: Location, teacher: Location | None) -> Backbones:
    """Look into files that ``d3etr weights get`` or ``d3etr import-weights`` wrote.

    Args:
        student: file of the students' backbone.
        teacher: file of the teacher's; None: the same.

    Raises:
        UserError: one of them is no such file, or their maps have different strides.
    """
    ours = _read(student)
    theirs = ours if teacher is None else _read(teacher)
    if theirs.strides != ours.strides:
        raise UserError(
            f"{teacher} ({theirs.name}) has maps of strides {[*theirs.strides]}, {student} "
            f"({ours.name}) of {[*ours.strides]}: expected the same, so that a student can start "
            "from the teacher's encoder and decoder"
        )
    return Backbones(theirs, ours)


def _read(place: Location) -> BackboneStart:
    with local_file(place) as file:
        about = read_metadata(file)
        # Files of pretrain-backbone do not say which normalisation their images had.
        if "backbone" not in about or "pretraining" in about:
            raise UserError(
                f"{place} holds no ImageNet weights of a backbone: expected a file that 'd3etr "
                "weights get' or 'd3etr import-weights' wrote from a backbone's"
            )
        try:
            config = BackboneConfig.model_validate_json(about["backbone"])
        except ValidationError as error:
            raise UserError(f"{place}: its 'backbone' metadata is broken: copy it again") from error
        backbone = build_backbone(config)
        load_backbone_weights(backbone, file)
    strides = [stride for stride in backbone.stage_strides if stride >= FINEST_STRIDE]
    if config.has_blocks or not strides:
        raise UserError(
            f"{place}: {config.name} has no maps of several resolutions, of which detectors that "
            "init makes take those from stride 8 on: give a network with stages, such as "
            "timm/tf_efficientnet_lite0 ('d3etr weights get efficientnet-lite0')"
        )
    weights = place.absolute() if isinstance(place, Path) else place
    return BackboneStart(weights, config.name, tuple(strides[-BACKBONE_LEVELS:]))
