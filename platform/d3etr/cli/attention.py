"""``d3etr attention``: where teacher and student look when they detect the same object."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import (
    SOME_FAILED,
    Command,
    add_json,
    add_output_root,
    answer,
    complain,
    file_to_write,
    positive,
    writing,
)
from d3etr.cli.progress import progress_bar
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.config.location import Url
    from d3etr.config.tree import Config
    from d3etr.data.records import ImageRecord
    from d3etr.data.splits import DetectionSplit
    from d3etr.tracking.figures.images import ObjectView


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or the beginning of its name")
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="others",
        metavar="NAME=WEIGHTS",
        help="one more detector, for example 'Plain student=runs/.../weights.safetensors'",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="validation",
        help="whose images",
    )
    parser.add_argument("--objects", type=positive, default=4, metavar="N", help="rows (default 4)")
    parser.add_argument(
        "--output",
        type=file_to_write(".png"),
        default=Path("attention.png"),
        metavar="FILE",
        help="the picture (default attention.png)",
    )
    add_output_root(parser)
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.config.load import load_config
    from d3etr.data.splits import open_split
    from d3etr.engine.find_run import find_run
    from d3etr.fonts import readable_names
    from d3etr.tracking.figures.images import draw_attention
    from d3etr.tracking.figures.look import choose_images
    from d3etr.tracking.figures.style import save

    folder = find_run(options.run, options.output_root)
    config = load_config(folder.config)
    files = _detectors(config, folder.weights, options.others)
    with progress_bar() as progress:
        split = open_split(config.data, options.split, progress)
    chosen = choose_images(split, options.objects)
    records = [record for record in chosen if _is_readable(split, record, config)]
    views = _views(config, files, split, records)
    names = {each.name: each.id for each in split.categories}
    shown = readable_names((names[view.name], view.name) for view in views)
    with writing(options.output):
        drawn = [replace(view, name=name) for view, name in zip(views, shown, strict=True)]
        save(draw_attention(drawn), options.output)
    value = {"picture": str(options.output), "objects": [_as_json(view) for view in views]}
    answer(options, value, f"{len(views)} objects, {', '.join(files)} -> {options.output}")
    return SOME_FAILED if len(records) < len(chosen) else 0


def _detectors(config: Config, weights: Path, others: list[str]) -> dict[str, Url | Path]:
    """Name -> weights file: the run's teacher, the run itself, and what was asked for."""
    from d3etr.config.location import named_location

    files: dict[str, Url | Path] = {}
    if config.teacher is not None and config.teacher.weights is not None:
        files["Teacher"] = config.teacher.weights
    files["Student"] = weights
    for other in others:
        name, equals, place = other.partition("=")
        if not equals or not name or not place:
            raise UserError(f"--with {other!r}: expected NAME=WEIGHTS")
        files[name] = named_location(place)
    return files


def _is_readable(split: DetectionSplit, record: ImageRecord, config: Config) -> bool:
    """Whether an image can be decoded; names it if not."""
    from d3etr.data.dataset import DetectionDataset

    alone = replace(split, records=(record,))
    try:
        DetectionDataset(alone, config.data.preprocessing).decoded(0)
    except UserError as error:
        complain(f"error: {error}")
        return False
    return True


def _views(
    config: Config,
    files: dict[str, Url | Path],
    split: DetectionSplit,
    records: Sequence[ImageRecord],
) -> list[ObjectView]:
    from d3etr.inference import load
    from d3etr.tracking.figures.look import TEACHER, look_at, object_view

    detectors = {name: load(place, "cpu").detector for name, place in files.items()}
    scales = {TEACHER: config.teacher_scale}
    seen = {
        name: look_at(each, split, records, config.data, scales.get(name, 1.0))
        for name, each in detectors.items()
    }
    names = [category.name for category in split.categories]
    views = [object_view(split, record, seen, names) for record in records]
    found = [view for view in views if view is not None]
    if not found:
        raise UserError(
            f"{split.annotations} has no readable image with an object to look at; choose another "
            "--split"
        )
    return found


def _as_json(view: ObjectView) -> dict[str, Any]:
    scores = {name: None if look is None else look.score for name, look in view.looks.items()}
    return {"name": view.name, "box_xyxy": view.box_xyxy.tolist(), "scores": scores}


COMMAND = Command(
    "attention", "draw where teacher and student look for the same object", _add_arguments, _run
)
