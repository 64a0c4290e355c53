"""What a data set is like: its splits, sizes of images and objects, objects per image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d3etr.config.location import Url
from d3etr.data.judgement import judge_categories
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.errors import UserError
from d3etr.progress import OnProgress
from d3etr.project.locate import Located, locate
from d3etr.project.splitting import SHARES, coco_tree, divide

_SMALL = 0.1
"""Share of the objects that are smaller than what counts as the smallest."""
_FEWEST = 5
"""Objects of a class whose size is known by their median."""


@dataclass(frozen=True)
class Statistics:
    """Numbers of a training split that sizes are chosen by.

    Attributes:
        images: how many.
        objects: how many in all.
        classes: name -> objects.
        width: median of the images, pixels.
        height: median of the images, pixels.
        relative_size: median over objects of the square root of their share of the image.
        smallest: 10 % of all objects, or half of those of one class, are smaller; pixels of the
            square root of their area.
        most_objects: in one image.
    """

    images: int
    objects: int
    classes: dict[str, int]
    width: int
    height: int
    relative_size: float
    smallest: float
    most_objects: int

    @property
    def longest(self) -> int:
        """The longer of width and height, pixels."""
        return max(self.width, self.height)

    @classmethod
    def of(cls, split: DetectionSplit) -> Statistics:
        """Those of a split.

        Raises:
            UserError: it has no objects.
        """
        objects = split.objects
        if not len(objects.labels):
            raise UserError(
                f"{split.annotations}: no image of {split.name} has an object: there is nothing to "
                "learn from; annotate some"
            )
        sizes = np.array([(record.width, record.height) for record in split.records])
        areas = objects.boxes_xywh[:, 2:].prod(1)
        counts = np.bincount(objects.labels, minlength=len(split.categories))
        width, height = np.median(sizes, axis=0)
        return cls(
            images=len(split.records),
            objects=len(objects.labels),
            classes={c.name: int(n) for c, n in zip(split.categories, counts, strict=True)},
            width=round(width),
            height=round(height),
            relative_size=float(np.median(np.sqrt(areas / objects.sizes.prod(1)))),
            smallest=_smallest(np.sqrt(areas), objects.labels),
            most_objects=int(np.bincount(objects.images).max()),
        )


def _smallest(sides: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """What the images' size has to leave visible, of objects of ``sides`` [n] pixels."""
    counted = np.bincount(labels)
    classes = np.flatnonzero(counted >= _FEWEST).tolist()
    medians = [float(np.median(sides[labels == label])) for label in classes]
    return min([float(np.quantile(sides, _SMALL)), *medians])


@dataclass(frozen=True)
class Survey:
    """A data set that has splits.

    Attributes:
        format: of its annotations, as people call it.
        splits: train, validation and maybe test, as read.
        places: ``data.train`` and its like, as plain values; of splits that were made here, the
            images alone.
        made: split -> the COCO file that lists its images, where these were divided here.
        part: what the data set calls the part that was divided; None where it has no parts.
        statistics: of the training split.
        warnings: what may be wrong, a sentence each.
    """

    format: str
    splits: dict[str, DetectionSplit]
    places: dict[str, dict[str, Any]]
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    part: str | None = None
    statistics: Statistics = field(init=False)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", Statistics.of(self.splits["train"]))

    def data_tree(self, folder: Path) -> dict[str, Any]:
        """``data.train`` and its like, as plain values.

        Args:
            folder: where the files of ``made`` are.
        """
        return {
            name: tree
            | ({"annotations": str(folder / f"{name}.json")} if name in self.made else {})
            for name, tree in self.places.items()
        }


def survey(
    data: Path, images: Path | None, on_progress: OnProgress, *, follow_links: bool = False
) -> Survey:
    """Read a data set, and divide its images where nobody has.

    Args:
        data: see ``locate``.
        images: of COCO files or Pascal VOC.
        on_progress: called while files are read.
        follow_links: whether links may lead out of the folder of images.

    Raises:
        UserError: the data set cannot be used; what is wrong, and where.
    """
    on_progress(f"reading {data}")
    located = locate(data, images, follow_links=follow_links)
    read = {
        name: read_split(name, split, keys=located.keys) for name, split in located.splits.items()
    }
    judge_categories(read).raise_errors()
    trees = {
        name: split.model_dump(mode="json", exclude_defaults=True)
        for name, split in located.splits.items()
    }
    found = Survey(located.format, read, trees)
    if "validation" not in read:
        found = _divided(found, located)
    _require_measurable(found.splits["validation"], divided="validation" in found.made)
    warnings = (*located.warnings, *_empty_test(found.splits))
    for text in warnings:
        on_progress(f"warning: {text}")
    logged = (text for split in read.values() for text in split.warnings)
    return replace(found, warnings=(*dict.fromkeys(logged), *warnings))


def _divided(found: Survey, located: Located) -> Survey:
    """With the training images divided into the splits that the data set lacks."""
    whole = found.splits["train"]
    folder = whole.images.location
    if isinstance(folder, Url):
        raise UserError(f"{folder.shown}: images to be divided must be on this machine")
    lacking = {name: share for name, share in SHARES.items() if name not in found.splits}
    parts = divide(whole.records, {"train": SHARES["train"], **lacking})
    made = {name: coco_tree(whole, records) for name, records in parts.items()}
    place: dict[str, Any] = {"images": str(folder.absolute())}
    if located.splits["train"].follow_links:
        place["follow_links"] = True
    splits = found.splits | {
        name: replace(whole, name=name, records=tuple(records)) for name, records in parts.items()
    }
    places = found.places | dict.fromkeys(made, place)
    return replace(
        found,
        splits={name: splits[name] for name in SHARES},
        places={name: places[name] for name in SHARES},
        made=made,
        part=located.part,
    )


def _require_measurable(validation: DetectionSplit, divided: bool) -> None:
    """Refuse a validation split by which no weights can be chosen.

    Raises:
        UserError: no image has an object.
    """
    if len(validation.objects.labels):
        return
    text = "no image of validation has an object, so that nothing would tell which weights are best"
    remedy = "annotate some, or take this split away: init then divides the training images"
    if divided:
        text = "found one image with an object; expected two at least, the second to validate on"
        remedy = "annotate more"
    raise UserError(f"{validation.annotations}: {text}; {remedy}")


def _empty_test(splits: Mapping[str, DetectionSplit]) -> list[str]:
    """A warning where there is a test split and nothing to measure on it."""
    if "test" not in splits or len(splits["test"].objects.labels):
        return []
    return ["no image of test has an object: there is nothing to measure"]
