"""What a student's weights are before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d3etr.config.detector import InitialiseFromConfig
from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.data.annotations import Category
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.init_from import LoadedParts, load_matching
from d3etr.detectors.weights import load_backbone_weights, load_weights
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.methods.selection import teacher_layers
from d3etr.storage.fetch import local_file

logger = get_logger(__name__)


def build_student(
    config: Config, categories: Sequence[Category], *, quiet: bool
) -> DetectionTransformer:
    """Build the student, started from the weights that its configuration names.

    Args:
        config: uses ``student`` and the data's normalisation.
        categories: of the data.
        quiet: leave the warning about tensors that were not taken to another worker.

    Raises:
        UserError: weights are missing or do not fit.
    """
    require_start(config)
    student = build_detector(config.student.detector, len(categories))
    weights = config.student.backbone_weights
    if isinstance(weights, Url | Path):
        with local_file(weights) as file:
            load_backbone_weights(student.backbone, file)
    elif weights is not None:
        load_backbone_weights(student.backbone, weights)
    if config.student.initialise_from is not None:
        taken = _initialise(student, config, categories)
        if taken.left and not quiet:
            text = "student.initialise_from: %d tensors taken from %s; %d of the same parts start "
            counts = len(taken.names), config.initial_weights, len(taken.left)
            logger.warning(f"{text}at random: %s", *counts, taken.left_in_words())
    return student.train()


def _initialise(
    student: DetectionTransformer, config: Config, categories: Sequence[Category]
) -> LoadedParts:
    start, weights = config.student.initialise_from, config.initial_weights
    assert start is not None and weights is not None
    with local_file(weights) as file:
        source, info = load_weights(file)
    theirs, ours = info.preprocessing.normalisation, config.data.preprocessing.normalisation
    if "backbone" in start.parts and theirs != ours:
        raise UserError(
            f"student.initialise_from.weights {weights}: its backbone expects images with "
            f"normalisation '{theirs}', but data.preprocessing.normalisation is '{ours}': set it "
            f"to '{theirs}', or take 'backbone' out of the parts"
        )
    same_classes = [name for _, name in info.categories] == [c.name for c in categories]
    depths = student.config.decoder_layers, source.config.decoder_layers
    try:
        layers = _source_layers(start, *depths)
        return load_matching(
            student,
            source,
            start.parts,
            same_classes=same_classes,
            layers=layers,
            narrows=start.widths == "principal",
        )
    except UserError as error:
        raise UserError(f"student.initialise_from.weights {weights}: {error}") from error


def _source_layers(start: InitialiseFromConfig, ours: int, theirs: int) -> list[int] | None:
    """The other detector's decoder layer for each of the student's; None takes its first ones.

    Raises:
        UserError: a list has another length, or names a layer that is not there.
    """
    if start.layers == "first":
        return None
    if start.layers == "uniform":
        return teacher_layers("uniform", ours, theirs)
    layers = [int(layer) for layer in start.layers]
    if len(layers) != ours or max(layers) >= theirs:
        raise UserError(
            f"layers is {layers}: expected {ours} entries (one per student decoder layer), each "
            f"below {theirs} (its decoder layers)"
        )
    return layers


def require_start(config: Config) -> None:
    """Refuse a backbone whose statistics would be those of nothing.

    Raises:
        UserError: it is frozen and starts from no weights.
    """
    backbone = config.student.detector.backbone
    start = config.student.initialise_from
    starts = config.student.backbone_weights or (start is not None and "backbone" in start.parts)
    if backbone.keeps_statistics and not starts:
        raise UserError(
            f"student.backbone_weights is null, but backbone '{backbone.name}' has norm 'frozen': "
            "random weights would keep batch statistics that were never taken. Set "
            "student.backbone_weights to 'imagenet' or a file, or student.detector.backbone.norm "
            "to 'group' or 'batch'"
        )
