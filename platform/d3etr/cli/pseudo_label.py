"""``d3etr pseudo-label``: detections of images without labels as a COCO file to train on."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import (
    Command,
    add_device,
    add_json,
    add_overrides,
    add_weights,
    answer,
    file_to_write,
    fraction,
    writing,
)
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError
from d3etr.files import write_text

if TYPE_CHECKING:
    from d3etr.data.splits import DetectionSplit
    from d3etr.progress import OnProgress

BEST = "best"


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
        help="instead of IMAGES: its training images without labels, beside those with labels; "
        "its validation split chooses the best threshold",
    )
    add_overrides(parser)
    parser.add_argument(
        "--threshold",
        type=_threshold,
        default=0.5,
        metavar="SCORE",
        help="lowest score (default 0.5); 'best': highest F1 at IoU 0.5 on the validation images",
    )
    for flag, text in (
        ("--validation", "labelled images that choose the best threshold"),
        ("--merge", "labelled images to put into the file too"),
    ):
        parser.add_argument(flag, nargs=2, metavar=("IMAGES", "ANNOTATIONS"), help=text)
    add_device(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.inference import load
    from d3etr.pseudo_labels import best_threshold, pseudo_labels

    _require_consistent(options)
    predictor = load(options.weights, options.device)
    threshold, f1 = options.threshold, None
    with progress_bar() as progress:
        images, labelled, validation = _splits(options, progress)
        if validation is not None:
            threshold, f1 = best_threshold(predictor, validation, progress)
        content, folder = pseudo_labels(predictor, images, labelled, threshold, progress)
    with writing(options.output):
        write_text(options.output, json.dumps(content))
    made = sum("score" in entry for entry in content["annotations"])
    result = {
        "output": str(options.output),
        "images_folder": str(folder),
        "images": len(images.records),
        "pseudo_labels": made,
        "labelled_images": 0 if labelled is None else len(labelled.records),
        "labels": len(content["annotations"]) - made,
        "threshold": threshold,
        "f1": f1,
    }
    chosen = "" if f1 is None else f" (the best: F1 {f1:.3f} on the validation images)"
    text = (
        f"{options.output}: {made:,} pseudo-labels on {len(images.records):,} images, score at "
        f"least {threshold:.3f}{chosen}; {result['labels']:,} labels on "
        f"{result['labelled_images']:,} others\n"
        f'train on it: --set "data.train={{images: {folder}, annotations: {options.output}}}"'
    )
    answer(options, result, text)
    return 0


def _require_consistent(options: Namespace) -> None:
    """Refuse arguments that contradict each other or have no effect."""
    if (options.images is None) == (options.recipe is None):
        raise UserError("expected either IMAGES or --recipe RECIPE: they say what to look at")
    if options.recipe is not None and (options.merge or options.validation):
        raise UserError("--merge and --validation have no effect with --recipe, which has both")
    if options.recipe is None and options.overrides:
        raise UserError("--set has no effect without --recipe")
    if options.threshold is None and options.recipe is None and options.validation is None:
        raise UserError("--threshold best needs --validation IMAGES ANNOTATIONS to choose on")
    if options.threshold is not None and options.validation is not None:
        raise UserError("--validation has no effect without --threshold best")


def _splits(
    options: Namespace, progress: OnProgress
) -> tuple[DetectionSplit, DetectionSplit | None, DetectionSplit | None]:
    """Images to look at, labelled ones beside them, and those that choose the threshold."""
    from d3etr.config.data import SplitConfig
    from d3etr.config.load import load_config
    from d3etr.data.splits import UNLABELLED, Keys, open_split, read_split

    best = options.threshold is None
    if options.recipe is None:

        def read(flag: str, place: list[str] | None) -> DetectionSplit | None:
            if place is None:
                return None
            images, annotations = map(Path, place)
            config = SplitConfig(images=images, annotations=annotations)
            keys = Keys(f"--{flag} IMAGES", f"--{flag} ANNOTATIONS")
            return read_split("train", config, progress, keys=keys)

        folder = Path(options.images)
        place = SplitConfig(images=folder, annotations=folder)
        images = read_split(UNLABELLED, place, progress, keys=Keys("IMAGES", "IMAGES"))
        return images, read("merge", options.merge), read("validation", options.validation)
    data = load_config(options.recipe, options.overrides).data
    train = open_split(data, "train", progress)
    images = train.unlabelled or replace(train, name=UNLABELLED, records=train.left_out)
    if not images.records:
        raise UserError(
            f"{options.recipe} has no images without labels: expected data.unlabelled, or "
            "data.labelled_share below 1"
        )
    validation = open_split(data, "validation", progress) if best else None
    return images, train, validation


COMMAND = Command(
    "pseudo-label",
    "write detections on images without labels as a COCO file to train on",
    _add_arguments,
    _run,
)
