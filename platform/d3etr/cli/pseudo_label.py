"""``d3etr pseudo-label``: detections of images without labels as a COCO file to train on."""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from d3etr.cli.command import (
    Command,
    add_device,
    add_json,
    add_overrides,
    add_weights,
    answer,
    ensure_writable,
    file_to_write,
    fraction,
    writing,
)
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError
from d3etr.files import write_whole

if TYPE_CHECKING:
    from d3etr.data.splits import DetectionSplit
    from d3etr.inference import Predictor
    from d3etr.progress import OnProgress

BEST = "best"

_Work: TypeAlias = "tuple[DetectionSplit, DetectionSplit | None, str]"
"""Images to look at, those that choose the threshold, and the override that trains on the file."""


def _threshold(text: str) -> float | None:
    """A score; None stands for the best one."""
    try:
        return None if text == BEST else fraction(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or '{BEST}'") from error


def _add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument(
        "images", nargs="?", metavar="IMAGES", help="a folder; every image in it and below"
    )
    parser.add_argument(
        "output", type=file_to_write(".json"), metavar="OUT.json", help="the COCO file to write"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="RECIPE",
        help="instead of IMAGES: its training images without labels; its validation split chooses "
        "the best threshold",
    )
    add_overrides(parser)
    parser.add_argument(
        "--threshold",
        type=_threshold,
        default=0.5,
        metavar="SCORE",
        help="lowest score (default 0.5); 'best': highest F1 at IoU 0.5 on the validation images",
    )
    parser.add_argument(
        "--validation",
        nargs=2,
        metavar=("IMAGES", "ANNOTATIONS"),
        help="labelled images that choose the best threshold",
    )
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.loading import load_weights_file
    from d3etr.pseudo_labels import best_threshold, pseudo_labels

    _require_consistent(options)
    ensure_writable(options.output)
    predictor = load_weights_file(options.weights, options.device)
    threshold, f1 = options.threshold, None
    with progress_bar() as progress:
        if options.recipe is None:
            images, validation, override = _given(options, progress)
        else:
            images, validation, override = _of_recipe(options, predictor, progress)
        if validation is not None:
            threshold, f1 = best_threshold(predictor, validation, progress)
        content = pseudo_labels(predictor, images, threshold, progress)
    with writing(options.output):
        write_whole(options.output, json.dumps(content))
    result = {
        "output": str(options.output),
        "images": len(images.records),
        "pseudo_labels": len(content["annotations"]),
        "threshold": threshold,
        "f1": f1,
        "override": override,
    }
    chosen = "" if f1 is None else f" (the best: F1 {f1:.3f} on the validation images)"
    text = (
        f"{options.output}: {result['pseudo_labels']:,} pseudo-labels on {len(images.records):,} "
        f"images, score at least {threshold:.3f}{chosen}\n"
        f"train on them beside a recipe's labels: --set {shlex.quote(override)}"
    )
    answer(options, result, text)
    return 0


def _require_consistent(options: Namespace) -> None:
    """Refuse arguments that contradict each other or have no effect."""
    if (options.images is None) == (options.recipe is None):
        raise UserError("expected either IMAGES or --recipe RECIPE: they say what to look at")
    if options.recipe is not None and options.validation:
        raise UserError("--validation has no effect with --recipe, which has validation images")
    if options.recipe is None and options.overrides:
        raise UserError("--set has no effect without --recipe")
    if options.threshold is None and options.recipe is None and options.validation is None:
        raise UserError("--threshold best needs --validation IMAGES ANNOTATIONS to choose on")
    if options.threshold is not None and options.validation is not None:
        raise UserError("--validation has no effect without --threshold best")


def _given(options: Namespace, progress: OnProgress) -> _Work:
    """A folder, and the labelled images of ``--validation``."""
    from d3etr.config.data import SplitConfig, UnlabelledConfig
    from d3etr.data.splits import UNLABELLED, Keys, read_split
    from d3etr.pseudo_labels import override_with

    folder, validation = Path(options.images), None
    place = SplitConfig(images=folder, annotations=folder)
    images = read_split(UNLABELLED, place, progress, keys=Keys("IMAGES", "IMAGES"))
    if options.validation is not None:
        config = SplitConfig(
            **dict(zip(("images", "annotations"), options.validation, strict=True))
        )
        keys = Keys("--validation IMAGES", "--validation ANNOTATIONS")
        validation = read_split("train", config, progress, keys=keys)
    return images, validation, override_with(options.output, UnlabelledConfig(images=folder))


def _of_recipe(options: Namespace, predictor: Predictor, progress: OnProgress) -> _Work:
    """A recipe's training images without labels, and its validation split."""
    from d3etr.config.load import load_config
    from d3etr.config.overrides import as_overrides
    from d3etr.data.splits import open_split
    from d3etr.pseudo_labels import override_with, require_same_names, with_unlabelled_images

    data = load_config(options.recipe, options.overrides).data
    train, images = with_unlabelled_images(data, progress)
    assert train.unlabelled is not None
    require_same_names(predictor, train)
    best = options.threshold is None
    validation = open_split(data, "validation", progress) if best else None
    override = override_with(options.output, images)
    if data.unlabelled is not None and "share" not in images.model_fields_set:
        override = as_overrides({"data.unlabelled.labels": options.output})[0]
    return train.unlabelled, validation, override


COMMAND = Command(
    "pseudo-label",
    "write detections on images without labels as a COCO file to train on",
    _add_arguments,
    _run,
)
