"""Whether a run's data and its recipe go together, judged by one rule wherever that is asked.

``check-data``, ``--dry-run`` and the start of training call the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from d3etr.config.data import PreprocessingConfig
from d3etr.config.training import EvaluationConfig, warmup_problem
from d3etr.config.tree import Config
from d3etr.data.annotations import Category
from d3etr.data.preprocessing import output_size
from d3etr.data.record_images import naming
from d3etr.data.records import shown_ids, to_xyxy
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError

_LEAST_SIDE = 4.0
"""Pixels of an object's longer side, below which a detector hardly sees it."""
_LEAST_SHARE = 0.01
"""Fewer objects than that are odd ones, which most data sets have."""


@dataclass(frozen=True)
class Judgement:
    """What is known before the first step.

    Attributes:
        errors: why the run would fail or mean nothing.
        warnings: what would make it worse than it could be.
    """

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(self.errors + other.errors, self.warnings + other.warnings)

    def raise_errors(self) -> None:
        """Refuse the run, naming all reasons.

        Raises:
            UserError: there are errors.
        """
        if self.errors:
            raise UserError("\n".join(self.errors))


def judge(config: Config, splits: Mapping[str, DetectionSplit]) -> Judgement:
    """Judge the splits among themselves and against the recipe.

    Args:
        config: the run.
        splits: by name; ``test`` only if it is there.
    """
    judgement = judge_categories(splits) + judge_against_recipe(config, splits)
    judgement += _judge_places(splits)
    for split in splits.values():
        judgement += judge_objects(split, config.evaluation)
    return judgement


def judge_categories(splits: Mapping[str, DetectionSplit]) -> Judgement:
    """A label means the same class in all splits: their ids and names are the same."""
    readable = [*splits.values()]  # none where all are broken
    errors = []
    for other in readable[1:]:
        first = readable[0]
        if first.categories == other.categories:
            continue
        wanted, found = set(first.categories), set(other.categories)
        errors.append(
            f"{other.annotations} ({other.name}) has other categories than {first.annotations} "
            f"({first.name}): only in {first.name}: {_category_list(wanted - found)}; only in "
            f"{other.name}: {_category_list(found - wanted)}. Expected the same ids and names: "
            "export all splits with one category list"
        )
    return Judgement(tuple(errors))


def _category_list(categories: set[Category]) -> str:
    by_id = sorted(categories, key=lambda category: category.id)
    return shown_ids(f"{category.name} (id {category.id})" for category in by_id) or "none"


def _judge_places(splits: Mapping[str, DetectionSplit]) -> Judgement:
    """Splits that have the same files; ``check-data`` finds copies of these, too."""
    files = {
        name: [split.images.shown(record.file_name) for record in split.records]
        for name, split in splits.items()
    }
    learnt = {*files.pop("train", ())}
    shared = {name: sum(file in learnt for file in measured) for name, measured in files.items()}
    texts = [
        f"data.{name}: {count} of its {len(files[name])} images are data.train's too, so results "
        "on it are too good: give it images of its own"
        for name, count in shared.items()
        if count
    ]
    return Judgement(warnings=tuple(texts))


def judge_objects(split: DetectionSplit, evaluation: EvaluationConfig) -> Judgement:
    """Which splits may be without objects; images without are fine everywhere."""
    if len(split.objects.labels):
        return Judgement()
    why, remedy = "there is nothing to measure", ""
    if split.name == "train":
        why, remedy = "there is nothing to learn from", "annotate some"
    elif split.name == "validation" and evaluation.keep == "best":
        why += ", and without mAP no weights are best"
        remedy = "annotate some, or set evaluation.keep to 'last'"
    elif split.name == "test" and evaluation.test:
        remedy = "annotate some, or set evaluation.test to false"
    text = f"data.{split.name}.annotations {split.annotations}: no image has an object: {why}"
    return Judgement(errors=(f"{text}; {remedy}",)) if remedy else Judgement(warnings=(text,))


def judge_against_recipe(config: Config, splits: Mapping[str, DetectionSplit]) -> Judgement:
    """Contradictions between the recipe and the data that it names."""
    judgement = Judgement()
    if "train" in splits:
        train, beside = splits["train"], splits["train"].unlabelled
        judgement += judge_length(config, len(train.records), train)
        if beside is not None:
            judgement += judge_unlabelled(config, len(beside.records), beside)
        judgement += judge_views(config, len(train.records), len(beside.records) if beside else 0)
    for split in splits.values():
        warnings = (
            _too_few_queries(split, config.student.detector.queries),
            _too_few_detections(split, config.evaluation.maximum_detections),
            _too_small(split, config.data.preprocessing),
        )
        judgement += Judgement(warnings=tuple(text for text in warnings if text))
    return judgement


def judge_length(config: Config, images: int, split: object = "the train split") -> Judgement:
    """Whether a run over ``images`` training images has a step, and outlives its warm-ups.

    Args:
        config: the run.
        images: of the train split.
        split: what they are of, for the text.
    """
    optimisation = config.optimisation
    per_epoch, size = config.steps_per_epoch(images), optimisation.batch_size
    if per_epoch == 0:
        where = split.annotations if isinstance(split, DetectionSplit) else split
        without = config.data.unlabelled_in(size)
        shared = f" (of them {without} without labels)" if without else ""
        text = (
            f"data.train: {where} has {images} images, fewer than one batch: set "
            f"optimisation.batch_size ({size}){shared} to at most that"
        )
        return Judgement(errors=(text,))
    steps = optimisation.total_steps(per_epoch)
    reason = f"optimisation.epochs {optimisation.epochs} of {per_epoch} steps each"
    problems = (
        _never_strong(config, steps, per_epoch),
        warmup_problem("optimisation.schedule", optimisation.schedule.warmup_steps, steps, reason),
        config.distillation.schedule_problem(steps, reason),
    )
    return Judgement(errors=tuple(text for text in problems if text))


def _never_strong(config: Config, steps: int, per_epoch: int) -> str | None:
    epochs = config.data.augmentation.off_for_last_epochs
    if not epochs or epochs * per_epoch < steps:
        return None
    return (
        f"data.augmentation.off_for_last_epochs ({epochs}) is all of the run "
        f"({steps / per_epoch:.3g} epochs): what it switches off would never be on; set it "
        "lower, or train longer"
    )


def judge_unlabelled(config: Config, images: int, split: object = "the scenes") -> Judgement:
    """Whether there are as many images without labels as one batch takes.

    Args:
        config: the run.
        images: without labels.
        split: what they are of, for the text.
    """
    needed = config.data.unlabelled_in(config.optimisation.batch_size)
    if images >= needed:
        return Judgement()
    where = split.annotations if isinstance(split, DetectionSplit) else split
    text = (
        f"data.unlabelled: {where} has {images} images without labels, fewer than the {needed} of "
        "one batch: set data.unlabelled.share lower, or give more images"
    )
    return Judgement(errors=(text,))


def judge_views(config: Config, images: int, unlabelled: int) -> Judgement:
    """Whether a run reads the views that it stores.

    Args:
        config: the run.
        images: training images with labels.
        unlabelled: those without.
    """
    per_epoch = config.steps_per_epoch(images)
    if config.teacher is None or config.teacher.views is None or not per_epoch:
        return Judgement()
    views, size = config.teacher.views, config.optimisation.batch_size
    steps = config.distillation.distilled_steps(config.optimisation.total_steps(per_epoch))
    without, warnings = config.data.unlabelled_in(size), []
    parts = {
        "count": (views.count, "image with labels", size - without, images),
        "unlabelled_count": (views.of_unlabelled, "image without labels", without, unlabelled),
    }
    for key, (count, what, each, known) in parts.items():
        if known and count > ceil(shown := steps * each / known):
            warnings.append(
                f"teacher.views.{key} is {count}, but the steps that distil show each {what} "
                f"{shown:.2g} times: the other views are stored for longer runs and other seeds "
                f"only; {max(1, ceil(shown))} would do for this one"
            )
    return Judgement(warnings=tuple(warnings))


def _too_few_queries(split: DetectionSplit, queries: int) -> str | None:
    return _beyond(split, "student.detector.queries", queries, "can be neither learnt nor detected")


def _too_few_detections(split: DetectionSplit, maximum: int) -> str | None:
    if split.name == "train":
        return None
    return _beyond(
        split, "evaluation.maximum_detections", maximum, "count as missed whatever is detected"
    )


def _beyond(split: DetectionSplit, key: str, limit: int, meaning: str) -> str | None:
    counts = np.bincount(split.objects.images, minlength=len(split.records))
    full = np.flatnonzero(counts > limit)
    if not len(full):
        return None
    shown = split.shown_images([split.records[index] for index in full.tolist()])
    return (
        f"data.{split.name}: {int((counts[full] - limit).sum())} of {counts.sum()} objects, in "
        f"{len(full)} images ({shown}), are beyond the first {limit} of their image, more than "
        f"{key} ({limit}): these {meaning}; set it to at least {counts.max()}"
    )


def _too_small(split: DetectionSplit, preprocessing: PreprocessingConfig) -> str | None:
    """Objects that only resizing makes too small."""
    after_size = []
    for record in split.records:
        with naming(split, record):
            after_size.append(output_size(record.width, record.height, preprocessing)[::-1])
    scales = np.array(after_size) / np.array([(r.width, r.height) for r in split.records])
    objects = split.objects
    corners = np.clip(to_xyxy(objects.boxes_xywh), 0.0, np.tile(objects.sizes, 2))
    sides = corners[:, 2:] - corners[:, :2]
    # An exact size scales width and height differently.
    before, after = sides.max(1), (sides * scales[objects.images]).max(1)
    small = (after < _LEAST_SIDE) & (after < before)
    if not len(before) or small.mean() < _LEAST_SHARE:
        return None
    least = int(after.argmin())
    shown = split.shown_images([split.records[objects.images[least]]])
    exact = preprocessing.exact_size is not None
    keys = "exact_size" if exact else "shortest_side and longest_side"
    return (
        f"data.{split.name}: {int(small.sum())} of {len(small)} objects have less than "
        f"{_LEAST_SIDE:g} pixels after resizing ({shown}: {before[least]:.1f} become "
        f"{after[least]:.1f}), too few to be seen; raise data.preprocessing.{keys}, "
        "or cut the images into tiles"
    )
