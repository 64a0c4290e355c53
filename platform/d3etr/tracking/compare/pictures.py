"""What several runs detect on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d3etr.config.data import DataConfig
from d3etr.data.digit_scenes.folder import scenes_folder, split_paths
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.inference import Predictor, load
from d3etr.tracking.compare.comparison import Comparison
from d3etr.tracking.figures.images import Scene
from d3etr.tracking.figures.look import choose_images, scene_of


@dataclass(frozen=True)
class Pictures:
    """The images of a comparison.

    Attributes:
        pictures: evenly spaced; none where the data is not here.
        missing: what cannot be shown and why, a sentence each.
    """

    pictures: tuple[Scene, ...]
    missing: tuple[str, ...]


def look_at_pictures(comparison: Comparison, count: int) -> Pictures:
    """Detect with each group's first run on a few images of the split that is compared.

    What is not here (data, images, weights) is named and left out; nothing is written.

    Args:
        comparison: of the runs.
        count: how many images.
    """
    split, missing = _find_split(comparison)
    if split is None:
        return Pictures((), tuple(missing))
    predictors: dict[str, Predictor | None] = {}
    for group in comparison.groups:
        try:
            predictors[group.label] = load(RunFolder(group.runs[0].folder).weights)
        except UserError as error:
            predictors[group.label] = None
            missing.append(f"No detections of {group.label}: {error}")
    pictures = []
    for record in choose_images(split, count):
        try:
            pictures.append(scene_of(split, record, predictors))
        except UserError as error:
            missing.append(f"One image is left out: {error}")
    return Pictures(tuple(pictures), tuple(missing))


def _find_split(comparison: Comparison) -> tuple[DetectionSplit | None, list[str]]:
    """Of the first run whose data is here; else why there is none."""
    name: Literal["validation", "test"] = "test" if comparison.split == "test" else "validation"
    problems: dict[str, None] = {}
    for group in comparison.groups:
        try:
            return _open(group.runs[0].config.data, name), []
        except UserError as error:
            problems[f"No images: {error}"] = None
    return None, list(problems)


def _open(data: DataConfig, name: Literal["validation", "test"]) -> DetectionSplit:
    """Like ``open_split``, but digit scenes that are not here are not written."""
    if data.digit_scenes is None:
        place = data.test if name == "test" else data.validation
    else:
        folder = scenes_folder(data.digit_scenes)
        place = split_paths(folder)[name]
        if not Path(str(place.annotations)).is_file():
            raise UserError(
                f"the digit scenes are not in {folder}; d3etr render-digit-scenes makes them"
            )
    if place is None:
        raise UserError(f"the run's configuration has no {name} split")
    return read_split(name, place)
