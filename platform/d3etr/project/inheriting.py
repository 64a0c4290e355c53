"""Whether a project's student can start from its teacher, settled before either has trained."""

from __future__ import annotations

import torch

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.build import build_detector
from d3etr.detectors.init_from import load_matching
from d3etr.detectors.weights import WeightsInfo
from d3etr.errors import UserError
from d3etr.project.recipes import Start

_IN_TRAINING = {"frozen_stages": 0, "trainable": True, "drop_path": 0.0}
"""Keys of backbones that change nothing of what their weights mean."""


def require_inheritable(start: Start, infos: tuple[WeightsInfo, WeightsInfo]) -> None:
    """Make sure that an inherited student can take what its recipe says.

    Args:
        start: of the project.
        infos: what the teacher's and the student's file say of themselves.

    Raises:
        UserError: they are of two kinds, widths or normalisations, nobody has weights of the
            student's backbone, or parts do not fit.
    """
    theirs, ours = infos[0].detector, infos[1].detector
    if (theirs.name, theirs.width) != (ours.name, ours.width):
        raise UserError(
            f"{start.teacher} is a {theirs.name} of width {theirs.width}, {start.student} a "
            f"{ours.name} of width {ours.width}: expected one kind and width, so that a student "
            "can start from the teacher's decoder"
        )
    pixels = [info.preprocessing.normalisation for info in infos]
    if pixels[0] != pixels[1]:
        raise UserError(
            f"{start.teacher} expects images with normalisation '{pixels[0]}', {start.student} "
            f"with '{pixels[1]}': expected the same, as teacher and students see the same images; "
            "give two files of one family"
        )
    if start.shares_backbone and _network(theirs.backbone) != _network(ours.backbone):
        raise UserError(
            f"{start.student} has backbone '{ours.backbone.name}', of which there are no ImageNet "
            f"weights, and {start.teacher} has another one ('{theirs.backbone.name}', or of other "
            "sizes): the inherited student's could start from nothing. Give two files with the "
            "same backbone, or a student over a network with ImageNet weights, such as RT-DETR's "
            "or D-FINE's"
        )
    with torch.device("meta"):  # names and shapes say whether parts fit
        source, student = (
            build_detector(config, len(infos[0].categories)) for config in (theirs, ours)
        )
    try:
        load_matching(student, source, start.inherited_parts, same_classes=True)
    except UserError as error:
        raise UserError(
            f"{start.student}: the inherited student could not start from {start.teacher}: {error}"
            "; for init, give two files that agree in it"
        ) from error


def _network(config: BackboneConfig) -> BackboneConfig:
    return config.model_copy(update=_IN_TRAINING)
