"""Checking every annotation and every image before anything trains on them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.images import applies_rotation, load_image, open_image, orientation
from d3etr.data.judgement import (
    Judgement,
    judge_categories,
    judge_objects,
)
from d3etr.data.plausibility import box_warnings, class_warnings, pixel_oddity, pixel_warnings
from d3etr.data.records import ImageRecord, shown_ids
from d3etr.data.report import DataReport, SplitReport
from d3etr.data.splits import (
    DetectionSplit,
    Keys,
    configured_splits,
    missing_images,
    missing_text,
    parse_split,
)
from d3etr.errors import UserError
from d3etr.progress import OnProgress

# COCO's borders between small, medium and large, square pixels.
_MEDIUM_AREA, _LARGE_AREA = 32**2, 96**2
_MOST_THREADS = 8
_PROGRESS_EVERY = 20
_LOSSLESS = ("RGB", "L", "P", "1", "RGBA", "LA", "PA")
"""Modes whose pixels are the same in RGB; transparent ones are checked one by one."""


Compare = Callable[[Mapping[str, DetectionSplit]], Judgement]


@dataclass(frozen=True)
class _ImageCheck:
    """What was found in one image file; ``problem`` is why it cannot be used."""

    record: ImageRecord
    content: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    has_rotation: bool = False
    rotated: bool = False
    missing: bool = False
    problem: str = ""
    oddity: str = ""


def check_data(
    data: DataConfig,
    on_progress: OnProgress | None = None,
    *,
    evaluation: EvaluationConfig | None = None,
    compare: Compare | None = None,
    keys: Mapping[str, Keys] | None = None,
) -> DataReport:
    """Read every annotation and decode every image of all configured splits.

    Args:
        data: where the splits are; digit scenes are written where they do not exist yet.
        on_progress: called with how many images are done.
        evaluation: which splits are measured and need objects.
        compare: judges the splits that could be read against a recipe.
        keys: what error texts call the places of a split; by default a recipe's keys.

    Raises:
        UserError: digit scenes cannot be written. What is wrong with splits is in the report.
    """
    reports: list[SplitReport] = []
    parsed: dict[str, DetectionSplit] = {}
    contents: dict[str, dict[str, int]] = {}
    for name, config in configured_splits(data, on_progress).items():
        try:
            split = parsed[name] = parse_split(
                name, config, on_progress, keys=(keys or {}).get(name)
            )
        except UserError as error:
            reports.append(_failed(name, config, error))
            continue
        checked = list(_check_images(split, on_progress))
        oddities = ((each.record.id, each.oddity) for each in checked if each.oddity)
        odd_pixels = pixel_warnings(oddities, split.shown_images)
        contents[name] = {each.content: each.record.id for each in checked if each.content}
        objects = judge_objects(split, evaluation or EvaluationConfig())
        objects += Judgement(warnings=tuple(box_warnings(split) + odd_pixels))
        reports.append(_with_verdict(_report(split, checked), split, objects))
    between = judge_categories(parsed)
    if compare is not None:
        between += compare(parsed)
    warnings = _overlap_warnings(contents) + tuple(class_warnings(parsed)) + between.warnings
    return DataReport(tuple(reports), errors=between.errors, warnings=warnings)


def _failed(name: str, config: SplitConfig, error: UserError) -> SplitReport:
    return SplitReport(
        name, str(config.images or ""), str(config.annotations), errors=(str(error),)
    )


def _check_images(split: DetectionSplit, on_progress: OnProgress | None) -> Iterator[_ImageCheck]:
    def check(record: ImageRecord) -> _ImageCheck:
        return _check_image(split, record)

    total = len(split.records)
    # Decoders and hashes let other threads run.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, found in enumerate(pool.map(check, split.records), start=1):
            if on_progress is not None and (done % _PROGRESS_EVERY == 0 or done == total):
                on_progress(f"checking {split.name} images", done, total)
            yield found


def _check_image(split: DetectionSplit, record: ImageRecord) -> _ImageCheck:
    try:
        if split.images.size(record.file_name) is None:
            return _ImageCheck(record, missing=True)
        raw = split.path(record).read_bytes()
    except OSError as error:
        return _ImageCheck(record, problem=str(error))
    expected = (record.width, record.height)
    content = hashlib.sha256(raw).hexdigest()
    try:
        pixels = load_image(raw, expected)
    except UserError as error:
        return _ImageCheck(record, content, problem=str(error))
    with open_image(raw) as image:
        return _ImageCheck(
            record,
            content,
            mode=image.mode,
            size=pixels.size,
            has_rotation=orientation(image) != 1,
            rotated=applies_rotation(image, expected),
            oddity=pixel_oddity(image, pixels),
        )


def _report(split: DetectionSplit, checked: Sequence[_ImageCheck]) -> SplitReport:
    records = split.records
    sizes = Counter(f"{record.width} x {record.height}" for record in records)
    usable = [each for each in checked if each.mode]
    wrong = [each for each in usable if each.size != (each.record.width, each.record.height)]
    return SplitReport(
        name=split.name,
        images_folder=str(split.images),
        annotations=str(split.annotations),
        format=split.format,
        digest=split.digest,
        images=len(records),
        **_object_facts(split),
        image_sizes=dict(sizes.most_common()),
        modes=dict(Counter(each.mode for each in usable).most_common()),
        **asdict(split.cleaning),
        without_objects=tuple(record.id for record in records if record.crowd.all()),
        rotated=tuple(each.record.id for each in usable if each.rotated),
        rotation_ignored=tuple(
            each.record.id for each in usable if each.has_rotation and not each.rotated
        ),
        missing=tuple(each.record.id for each in checked if each.missing),
        unreadable={each.record.id: each.problem for each in checked if each.problem},
        wrong_size={each.record.id: _size_text(each) for each in wrong},
        repeated_files=_repeated_files(records),
    )


def _object_facts(split: DetectionSplit) -> dict[str, Any]:
    """The fields of the report that count objects."""
    labels = np.concatenate([record.labels[~record.crowd] for record in split.records])
    boxes = np.concatenate([record.boxes_xyxy[~record.crowd] for record in split.records])
    areas = np.concatenate([record.areas[~record.crowd] for record in split.records])
    counts = np.bincount(labels, minlength=len(split.categories)).tolist()
    names = [category.name for category in split.categories]
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    quantiles = np.quantile(sides, (0, 0.5, 1)).round(1).tolist() if len(sides) else []
    return {
        "boxes": len(labels),
        "boxes_per_category": dict(zip(names, counts, strict=True)),
        "object_sizes": {
            "small": int((areas < _MEDIUM_AREA).sum()),
            "medium": int(((areas >= _MEDIUM_AREA) & (areas < _LARGE_AREA)).sum()),
            "large": int((areas >= _LARGE_AREA).sum()),
        },
        "box_sides": dict(zip(("lowest", "median", "highest"), quantiles, strict=False)),
    }


def _size_text(each: _ImageCheck) -> str:
    record = each.record
    return f"{each.size[0]} x {each.size[1]}, annotated {record.width} x {record.height}"


def _repeated_files(records: Sequence[ImageRecord]) -> dict[str, tuple[int, ...]]:
    users: dict[str, list[int]] = defaultdict(list)
    for record in records:
        users[record.file_name].append(record.id)
    return {name: tuple(ids) for name, ids in users.items() if len(ids) > 1}


def _with_verdict(report: SplitReport, split: DetectionSplit, objects: Judgement) -> SplitReport:
    errors, warnings = _errors(report, split), _warnings(report, split)
    return replace(report, errors=errors + objects.errors, warnings=warnings + objects.warnings)


def _errors(report: SplitReport, split: DetectionSplit) -> tuple[str, ...]:
    found = []
    missing = missing_images(split)
    if missing:
        found.append(f"{missing_text(split, missing)} ({split.shown_images(report.missing)})")
    found += [f"{_image(split, number)}: {why}" for number, why in report.unreadable.items()]
    found += [
        f"{_image(split, number)}: is {sizes}; correct width and height in {report.annotations}"
        for number, sizes in report.wrong_size.items()
    ]
    return tuple(found)


def _image(split: DetectionSplit, number: int) -> str:
    names = () if split.own_ids else (r.file_name for r in split.records if r.id == number)
    return next(iter(names), f"image id {number}")


def _warnings(report: SplitReport, split: DetectionSplit) -> tuple[str, ...]:
    # Boxes are clipped in most data sets: sides are rounded.
    found = split.cleaning.texts(
        split.places, "zero_size", "outside", "implausible_area", "foreign_flag"
    )
    empty = [name for name, count in report.boxes_per_category.items() if count == 0]
    if empty and report.name == "train":
        found.append(f"categories without a box to learn from: {', '.join(empty)}")
    for name, ids in report.repeated_files.items():
        found.append(f"{name} is the file of several images (ids {shown_ids(ids)})")
    lossy = [mode for mode in report.modes if mode not in _LOSSLESS]
    if lossy:
        found.append(f"converted to 8-bit RGB: {', '.join(lossy)}")
    if report.rotation_ignored:
        found.append(
            f"the EXIF rotation contradicts {split.annotations.name}: left as "
            f"stored ({split.shown_images(report.rotation_ignored)})"
        )
    return tuple(found)


def _overlap_warnings(contents: dict[str, dict[str, int]]) -> tuple[str, ...]:
    found = []
    names = list(contents)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            shared = sorted(
                contents[first][key] for key in contents[first].keys() & contents[second].keys()
            )
            if shared:
                found.append(
                    f"{len(shared)} images are in {first} and in {second}, so results on {second} "
                    f"are too good (image ids in {first}: {shown_ids(shared)})"
                )
    return tuple(found)
