"""Checking every annotation and every image before anything trains on them."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.images import load_image
from d3etr.data.judgement import Judgement, judge_categories, judge_objects
from d3etr.data.plausibility import box_warnings, class_warnings
from d3etr.data.records import Cleaning, ImageRecord, cleaning_texts, shown_ids
from d3etr.data.splits import (
    DetectionSplit,
    Keys,
    configured_splits,
    missing_problem,
    parse_split,
)
from d3etr.errors import UserError
from d3etr.progress import OnProgress, no_progress

# COCO's borders between small, medium and large, square pixels.
_MEDIUM_AREA, _LARGE_AREA = 32**2, 96**2
_MOST_THREADS = 8
_PROGRESS_EVERY = 20
_LEAST_CONTRAST = 16
"""Of 255, between an image's darkest and brightest values: twelve bits in sixteen have less."""
_SHOWN_MESSAGES = 10
_LINE_LENGTH, _INDENT = 100, 21


@dataclass(frozen=True)
class SplitReport:
    """What one split holds and what is odd about it.

    Attributes:
        name: train, validation or test.
        images_folder: where its images are.
        annotations: the file or folder of its annotations.
        format: of the annotations; empty where they could not be read.
        digest: sha256 of its content.
        images: number of images.
        boxes: number of boxes that count as objects: not dropped, no crowds.
        boxes_per_category: category name -> number of such boxes.
        object_sizes: COCO's small (under 32^2 square pixels), medium (to 96^2), large -> boxes.
        image_sizes: "width x height" -> images, most frequent first.
        cleaning: what was dropped, clipped or set aside; see ``records.CLEANED``.
        without_objects: ids of images without any object; they are kept.
        errors: why training or evaluation would fail.
        warnings: what may be wrong.
    """

    name: str
    images_folder: str
    annotations: str
    format: str = ""
    digest: str = ""
    images: int = 0
    boxes: int = 0
    boxes_per_category: dict[str, int] = field(default_factory=dict)
    object_sizes: dict[str, int] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    cleaning: Cleaning = field(default_factory=dict)
    without_objects: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Several lines for people."""
        facts = {
            "images": self.images_folder,
            "annotations": self.annotations,
            "boxes by category": _counts(self.boxes_per_category, len(self.boxes_per_category)),
            "boxes by size": _counts(self.object_sizes),
            "image sizes": _counts(self.image_sizes),
            **{
                name.replace("_", " "): f"{len(found)} ({shown_ids(found)})"
                for name, found in (*self.cleaning.items(), ("no objects", self.without_objects))
                if found
            },
        }
        title = f" ({self.format})" if self.format else ""
        lines = [f"{self.name}: {self.images} images, {self.boxes} boxes{title}"]
        lines += [
            textwrap.fill(
                f"  {name:<19}{fact}",
                _LINE_LENGTH,
                subsequent_indent=" " * _INDENT,
                break_long_words=False,
            )
            for name, fact in facts.items()
            if fact
        ]
        lines += [f"  {line}" for line in _messages(self.warnings, self.errors)]
        return "\n".join(lines)


@dataclass(frozen=True)
class DataReport:
    """What all configured splits hold.

    Attributes:
        splits: one report each.
        errors: what is wrong between splits.
        warnings: what is odd between splits.
    """

    splits: tuple[SplitReport, ...]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """False when training or evaluation would fail."""
        return not self.errors and not any(split.errors for split in self.splits)

    def text(self) -> str:
        """The whole report for people."""
        parts = [split.text() for split in self.splits]
        between = _messages(self.warnings, self.errors)
        if between:
            parts.append("\n".join(between))
        parts.append("ready to train" if self.ok else "training would fail: see ERROR above")
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """The whole report as a JSON object, every id listed."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def _messages(warnings: Sequence[str], errors: Sequence[str]) -> list[str]:
    lines = []
    for kind, texts in (("warning", warnings), ("ERROR", errors)):
        lines += [f"{kind}: {text}" for text in texts[:_SHOWN_MESSAGES]]
        if len(texts) > _SHOWN_MESSAGES:
            more = len(texts) - _SHOWN_MESSAGES
            lines.append(f"{kind}: and {more} more (--json lists them all)")
    return lines


def _counts(counts: Mapping[str, int], shown: int = 6) -> str:
    texts = [f"{name} {count}" for name, count in counts.items()]
    more = [f"and {len(texts) - shown} more"] if len(texts) > shown else []
    return ", ".join(texts[:shown] + more)


def check_data(
    data: DataConfig,
    on_progress: OnProgress | None = None,
    *,
    evaluation: EvaluationConfig | None = None,
    compare: Callable[[Mapping[str, DetectionSplit]], Judgement] | None = None,
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
    copies = defaultdict[str, list[tuple[str, int]]](list)
    for name, config in configured_splits(data, on_progress).items():
        try:
            split = parse_split(name, config, on_progress, keys=(keys or {}).get(name))
        except UserError as error:
            reports.append(_failed(name, config, error))
            continue
        parsed[name] = split
        checked = list(_check_images(split, on_progress or no_progress))
        for each in checked:
            if each.content:
                copies[each.content].append((name, each.record.id))
        objects = judge_objects(split, evaluation or EvaluationConfig())
        reports.append(_report(split, objects + _judge_images(split, checked)))
    between = judge_categories(parsed)
    if compare is not None:
        between += compare(parsed)
    warnings = (*_copy_warnings(copies.values()), *class_warnings(parsed), *between.warnings)
    return DataReport(tuple(reports), errors=between.errors, warnings=warnings)


def _failed(name: str, config: SplitConfig, error: UserError) -> SplitReport:
    return SplitReport(
        name, str(config.images or ""), str(config.annotations), errors=(str(error),)
    )


class _ImageCheck(NamedTuple):
    """What was found in one image file that is there.

    Attributes:
        record: of the image.
        content: digest of the file.
        problem: why it cannot be used.
        flat: whether there is hardly anything to see in it.
    """

    record: ImageRecord
    content: str = ""
    problem: str = ""
    flat: bool = False


def _check_images(split: DetectionSplit, on_progress: OnProgress) -> Iterator[_ImageCheck]:
    def check(record: ImageRecord) -> _ImageCheck:
        return _check_image(split, record)

    there = [r for r in split.records if split.images.size(r.file_name) is not None]
    # Decoders and hashes let other threads run.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for done, found in enumerate(pool.map(check, there), start=1):
            if done % _PROGRESS_EVERY == 0 or done == len(there):
                on_progress(f"checking {split.name} images", done, len(there))
            yield found


def _check_image(split: DetectionSplit, record: ImageRecord) -> _ImageCheck:
    expected = (record.width, record.height)
    try:
        raw = split.path(record).read_bytes()
        pixels = load_image(raw, expected)
    except (OSError, UserError) as error:
        return _ImageCheck(record, problem=str(error))
    problem = ""
    if pixels.size != expected:
        problem = (
            f"is {pixels.size[0]} x {pixels.size[1]}, annotated {record.width} x {record.height}; "
            f"correct width and height in {split.annotations}"
        )
    low, high = np.array(pixels.getextrema()).T
    flat = min(expected) > 1 and high.max() - low.min() < _LEAST_CONTRAST
    return _ImageCheck(record, hashlib.sha256(raw).hexdigest(), problem, bool(flat))


def _judge_images(split: DetectionSplit, checked: Sequence[_ImageCheck]) -> Judgement:
    missing = missing_problem(split)
    errors = [] if missing is None else [missing]
    for each in checked:
        if each.problem:
            name = f"image id {each.record.id}" if split.own_ids else each.record.file_name
            errors.append(f"{name}: {each.problem}")
    flat = [each.record for each in checked if each.flat]
    text = (
        f"{len(flat)} images have hardly any contrast ({split.shown_images(flat)}), as a camera "
        "or converter that failed writes them; 12-bit pixels must be scaled to all 16 bits"
    )
    return Judgement(tuple(errors), (text,) if flat else ())


def _report(split: DetectionSplit, images: Judgement) -> SplitReport:
    objects, records = split.objects, split.records
    sizes = Counter(f"{record.width} x {record.height}" for record in records)
    names = [category.name for category in split.categories]
    counts = np.bincount(objects.labels, minlength=len(names)).tolist()
    groups = np.digitize(objects.areas, [_MEDIUM_AREA, _LARGE_AREA])
    by_size = np.bincount(groups, minlength=3).tolist()
    # Boxes are clipped in most data sets: sides are rounded.
    warnings = cleaning_texts(split.cleaning, "clipped", "crowd")
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty and split.name == "train":
        warnings.append(f"categories without a box to learn from: {', '.join(empty)}")
    return SplitReport(
        name=split.name,
        images_folder=str(split.images),
        annotations=str(split.annotations),
        format=split.format,
        digest=split.digest,
        images=len(records),
        boxes=len(objects.labels),
        boxes_per_category=dict(zip(names, counts, strict=True)),
        object_sizes=dict(zip(("small", "medium", "large"), by_size, strict=True)),
        image_sizes=dict(sizes.most_common()),
        cleaning=split.cleaning,
        without_objects=tuple(record.id for record in records if record.crowd.all()),
        errors=images.errors,
        warnings=(*warnings, *images.warnings, *box_warnings(split)),
    )


def _copy_warnings(copies: Iterable[Sequence[tuple[str, int]]]) -> Iterator[str]:
    """Files that are there more than once, within a split or in several."""
    found = defaultdict[tuple[str, ...], list[int]](list)
    for places in copies:
        if len(places) > 1:
            found[tuple(dict.fromkeys(name for name, _ in places))].append(places[0][1])
    for names, ids in found.items():
        first, others = names[0], " and in ".join(names[1:])
        meaning = (
            f"{others}, so results on {names[-1]} are too good"
            if others
            else "it more than once, so that each copy lacks the other's boxes"
        )
        text = f"{len(ids)} images are in {first} and in {meaning}"
        yield f"{text} (image ids in {first}: {shown_ids(ids)})"
