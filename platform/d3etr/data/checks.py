"""Checking every annotation and every image before anything trains on them."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.images import load_image
from d3etr.data.judgement import Judgement, judge_categories, judge_objects
from d3etr.data.plausibility import box_warnings, class_warnings
from d3etr.data.records import ImageRecord, cleaning_texts, shown_ids
from d3etr.data.splits import (
    UNLABELLED,
    DetectionSplit,
    Keys,
    configured_splits,
    missing_problem,
    parse_split,
    training_split,
    unlabelled_place,
)
from d3etr.errors import UserError
from d3etr.progress import OnProgress, no_progress

# COCO's borders between small, medium and large, square pixels.
_MEDIUM_AREA, _LARGE_AREA = 32**2, 96**2
_MOST_THREADS = 8
_PROGRESS_EVERY = 20
_LEAST_CONTRAST = 16
"""Of 255, between an image's darkest and brightest values: twelve bits in sixteen have less."""
_OF_BOXES = ("boxes", "boxes_per_category", "object_sizes", "without_objects")
"""Facts that images without labels have none of."""
_FILE_LABELS = "labels of a file"
"""Name of the report on ``data.unlabelled.labels``."""
_SHOWN_MESSAGES = 10
_LINE_LENGTH, _INDENT = 100, 21


@dataclass(frozen=True)
class SplitReport:
    """What one split holds and what is odd about it.

    Attributes:
        name: train, validation or test.
        facts: see ``_facts``; empty where the annotations could not be read.
        errors: why training or evaluation would fail.
        warnings: what may be wrong.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Several lines for people."""
        lines = [self.name]
        for name, fact in self.facts.items():
            if isinstance(fact, Mapping):
                shown = _counts(fact, len(fact) if name == "boxes_per_category" else 6)
            else:
                shown = f"{len(fact)} ({shown_ids(fact)})" if isinstance(fact, tuple) else str(fact)
            line = f"  {name.replace('_', ' '):<19}{shown}"
            lines += textwrap.wrap(
                line, _LINE_LENGTH, subsequent_indent=" " * _INDENT, break_long_words=False
            )
        lines += [f"  {line}" for line in _messages(self.warnings, self.errors)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For machines, every id listed."""
        rest = {"errors": self.errors, "warnings": self.warnings}
        return {"name": self.name, **self.facts, **rest}


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
        splits = [split.as_dict() for split in self.splits]
        between = {"errors": self.errors, "warnings": self.warnings}
        return json.dumps({"ok": self.ok, "splits": splits, **between}, indent=1)


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
    for name, config in _places(data, on_progress).items():
        try:
            split = parse_split(name, config, on_progress, keys=(keys or {}).get(name))
        except UserError as error:
            reports.append(SplitReport(name, errors=(str(error),)))
            continue
        parsed[name] = split
        checked = list(_check_images(split, on_progress or no_progress))
        for each in checked:
            if each.content:
                copies[each.content].append((name, each.record.id))
        found = _judge_images(split, checked)
        if name != UNLABELLED:
            objects = judge_objects(split, evaluation or EvaluationConfig())
            found = objects + found + _judge_boxes(split)
        reports.append(SplitReport(name, _facts(split, data), found.errors, found.warnings))
    unlabelled = parsed.pop(UNLABELLED, None)
    if "train" in parsed:
        try:
            parsed["train"] = training_split(parsed["train"], data, unlabelled, on_progress)
        except UserError as error:
            reports.append(SplitReport(_FILE_LABELS, errors=(str(error),)))
        for labelled in parsed["train"].parts[1:]:
            reports.append(_labels_report(labelled, data))
    between = judge_categories(parsed)
    if compare is not None:
        between += compare(parsed)
    warnings = (*_copy_warnings(copies.values()), *class_warnings(parsed), *between.warnings)
    return DataReport(tuple(reports), errors=between.errors, warnings=warnings)


def _labels_report(split: DetectionSplit, data: DataConfig) -> SplitReport:
    """Of the labels that a file has for images without."""
    split = replace(split, name=_FILE_LABELS)
    warnings = (*split.warnings, *_judge_boxes(split).warnings)
    return SplitReport(split.name, _facts(split, data), warnings=warnings)


def _places(data: DataConfig, on_progress: OnProgress | None) -> dict[str, SplitConfig]:
    """Where each split is, and images without labels that have files of their own."""
    found = configured_splits(data, on_progress)
    others = data.unlabelled
    if others is None or others.rest_of_train:
        return found
    return found | {UNLABELLED: unlabelled_place(others, on_progress)}


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


def _judge_boxes(split: DetectionSplit) -> Judgement:
    # Boxes are clipped in most data sets: sides are rounded.
    warnings = cleaning_texts(split.cleaning, "clipped", "crowd")
    counts = np.bincount(split.objects.labels, minlength=len(split.categories))
    empty = [split.categories[label].name for label in np.flatnonzero(counts == 0).tolist()]
    if empty and split.name == "train":
        warnings.append(f"categories without a box to learn from: {', '.join(empty)}")
    return Judgement(warnings=(*warnings, *box_warnings(split)))


def _facts(split: DetectionSplit, data: DataConfig) -> dict[str, Any]:
    """What a split holds: counts, and ids of annotations or images.

    Boxes are those that count as objects; they are counted by class and by COCO's sizes (small
    under 32^2 square pixels, medium to 96^2, large). What was dropped, clipped or set aside
    is under the keys of ``records.CLEANED``.
    """
    objects, records = split.objects, split.records
    counts = np.bincount(objects.labels, minlength=len(split.categories)).tolist()
    groups = np.digitize(objects.areas, [_MEDIUM_AREA, _LARGE_AREA])
    sizes = np.bincount(groups, minlength=3).tolist()
    without = tuple(record.id for record in records if record.crowd.all())
    cleaned = {**split.cleaning, "without_objects": without}
    labelled = split.name == "train" and data.labelled_share < 1
    facts = {
        "images": len(records),
        **({"with_labels": data.labelled_images(len(records))} if labelled else {}),
        "boxes": len(objects.labels),
        "images_folder": str(split.images),
        "annotations": str(split.annotations),
        "format": split.format,
        "digest": split.digest,
        "boxes_per_category": {
            category.name: count for category, count in zip(split.categories, counts, strict=True)
        },
        "object_sizes": dict(zip(("small", "medium", "large"), sizes, strict=True)),
        "image_sizes": dict(Counter(f"{r.width} x {r.height}" for r in records).most_common()),
        **{name: found for name, found in cleaned.items() if found},
    }
    unknown = _OF_BOXES if split.name == UNLABELLED else ()
    return {name: fact for name, fact in facts.items() if name not in unknown}


def _copy_warnings(copies: Iterable[Sequence[tuple[str, int]]]) -> Iterator[str]:
    """Files that are there more than once, within a split or in several."""
    found = defaultdict[tuple[str, ...], list[int]](list)
    for places in copies:
        if len(places) > 1 and {name for name, _ in places} != {UNLABELLED}:
            found[tuple(dict.fromkeys(name for name, _ in places))].append(places[0][1])
    for names, ids in found.items():
        first, others = names[0], " and in ".join(names[1:])
        meaning = f"{others}, so results on {names[-1]} are too good"
        if not others:
            meaning = "it more than once, so that each copy lacks the other's boxes"
        elif names == ("train", UNLABELLED):
            meaning = f"{UNLABELLED}, so that their labels are known and left out of account"
        elif names[-1] == UNLABELLED:
            meaning = f"{others}, so results on {names[-2]} are of images that were trained on"
        text = f"{len(ids)} images are in {first} and in {meaning}"
        yield f"{text} (image ids in {first}: {shown_ids(ids)})"
