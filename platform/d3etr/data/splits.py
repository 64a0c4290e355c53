"""The splits of a data set: their images, cleaned annotations, and a digest of the content."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from d3etr.config.data import DataConfig, SplitConfig, UnlabelledConfig
from d3etr.config.location import Location
from d3etr.data.annotations import Annotations, Category, Source
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.file_labels import LABELS_KEY, labels_of
from d3etr.data.formats import AUTO, find_format
from d3etr.data.formats.unlabelled import UnlabelledImages
from d3etr.data.records import (
    SHOWN,
    Cleaning,
    ImageRecord,
    Objects,
    clean,
    cleaning_texts,
    shown_ids,
    without_objects,
)
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress
from d3etr.storage.fetch import local_file
from d3etr.storage.images import BESIDE, ImageFolder, open_folder

_LOGGER = get_logger(__name__)
SPLIT_NAMES: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
UNLABELLED = "unlabelled"
"""Name of the split of images without labels."""
_SUBSETS = {"validation": "val"}
"""What data sets call a split, where it is not our own name."""


class Keys(NamedTuple):
    """Configuration keys, or the flags of a command, that name the places of a split."""

    images: str
    annotations: str

    @classmethod
    def of_split(cls, name: str) -> Keys:
        """Those of a recipe."""
        return cls(f"data.{name}.images", f"data.{name}.annotations")


@dataclass(frozen=True, eq=False)
class DetectionSplit:
    """Annotations with their images.

    Attributes:
        name: train, validation, test or unlabelled.
        format: of the annotations, as people call it.
        categories: by rising id; a contiguous label is an index into this tuple.
        records: one per image, in the annotations' order.
        cleaning: what was dropped, clipped or set aside.
        own_ids: whether ids are the annotations' own; else texts name files.
        warnings: what may be wrong, a sentence each.
        images: the folder that file names are relative to.
        annotations: the file or folder, as configured.
        digest: sha256, hex, over the annotations and the images' names and file sizes.
        keys: what error texts call the places of ``images`` and ``annotations``.
        left_out: images of the same files that are not used, or whose labels are not.
        unlabelled: images without labels that are trained on beside these.
        parts: what the records are of, where it is more than one split: that of images with labels
            of their own, and that of images with those of a file (``data.unlabelled.labels``).
    """

    name: str
    format: str
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    cleaning: Cleaning
    own_ids: bool
    warnings: tuple[str, ...]
    images: ImageFolder
    annotations: Location
    digest: str
    keys: Keys
    left_out: tuple[ImageRecord, ...] = ()
    unlabelled: DetectionSplit | None = None
    parts: tuple[DetectionSplit, ...] = ()

    @cached_property
    def objects(self) -> Objects:
        """All objects that count."""
        return Objects.of(self.records)

    def path(self, record: ImageRecord) -> Path:
        """Where the image of ``record`` lies on this machine."""
        return self.images.path(record.file_name)

    def shown_images(self, records: Sequence[ImageRecord]) -> str:
        """The first few of ``records``, for texts."""
        if self.own_ids:
            return f"image ids {shown_ids(record.id for record in records)}"
        return f"images {shown_ids(record.file_name for record in records)}"


def configured_splits(
    data: DataConfig, on_progress: OnProgress | None = None, *, verify: Sequence[str] = SPLIT_NAMES
) -> dict[str, SplitConfig]:
    """The splits that ``data`` names; digit scenes are written where they do not exist yet.

    Args:
        data: where the splits are.
        on_progress: called while files are written.
        verify: splits of digit scenes whose files are compared with their digest.

    Raises:
        UserError: digit scenes cannot be written.
    """
    if data.digit_scenes is not None:
        return write_digit_scenes(data.digit_scenes, on_progress, verify=verify)
    configured = {name: getattr(data, name) for name in SPLIT_NAMES}
    return {name: split for name, split in configured.items() if split is not None}


def open_split(
    data: DataConfig,
    name: Literal["train", "validation", "test"],
    on_progress: OnProgress | None = None,
    *,
    fetch: bool = True,
) -> DetectionSplit:
    """Read one split of ``data``; the training split with its images without labels of their own.

    Args:
        data: where the splits are.
        name: the one to read.
        on_progress: called while files are written or fetched.
        fetch: False leaves a URL's images where they are and only makes sure that they exist.

    Raises:
        UserError: the split is not configured or cannot be used.
    """
    splits = configured_splits(data, on_progress, verify=[name])
    if name not in splits:
        raise UserError(
            f"data.{name} is not set, but the {name} split is needed: set "
            f"data.{name}.annotations, and data.{name}.images for COCO "
            f"(configured: {', '.join(splits)})"
        )
    split = read_split(name, splits[name], on_progress, fetch=fetch)
    if name != "train":
        return split
    config, unlabelled = data.unlabelled, None
    if config is not None and not config.rest_of_train:
        place = unlabelled_place(config, on_progress)
        unlabelled = read_split(UNLABELLED, place, on_progress, fetch=fetch)
    split = training_split(split, data, unlabelled, on_progress)
    for part in split.parts[1:]:
        for text in [*cleaning_texts(part.cleaning, "crowd"), *part.warnings]:
            _LOGGER.warning("%s: %s", part.annotations, text)
    return split


def training_split(
    split: DetectionSplit,
    data: DataConfig,
    unlabelled: DetectionSplit | None,
    on_progress: OnProgress | None = None,
) -> DetectionSplit:
    """The training split as it is trained on: images that keep their labels, and others.

    Those of a larger share under the same seed hold those of a smaller one.

    Args:
        split: all images of its annotations.
        data: what share keeps its labels, and whether the others are trained on, with what labels.
        unlabelled: images without labels that have files of their own.
        on_progress: called while a file of labels is fetched.

    Raises:
        UserError: a file of labels does not fit the images.
    """
    records, config = split.records, data.unlabelled
    if data.labelled_share < 1:
        order = np.random.default_rng(data.labelled_seed).permutation(len(records))
        labelled = set(order[: data.labelled_images(len(records))].tolist())
        rest = tuple(r for index, r in enumerate(records) if index not in labelled)
        records = tuple(r for index, r in enumerate(records) if index in labelled)
        split = replace(split, records=records, left_out=rest)
    if config is not None and config.rest_of_train:
        unknown = tuple(without_objects(record) for record in split.left_out)
        unlabelled = replace(split, name=UNLABELLED, records=unknown, left_out=())
    if config is None or config.labels is None or unlabelled is None:
        return replace(split, unlabelled=unlabelled)
    return _joined(split, _labelled_by(unlabelled, config.labels, split, on_progress))


def _labelled_by(
    images: DetectionSplit, file: Location, like: DetectionSplit, on_progress: OnProgress | None
) -> DetectionSplit:
    """Images with the labels of a file, whose classes are those of another split."""
    names = [category.name for category in like.categories]
    found = labels_of(images.records, file, names, on_progress)
    return replace(
        images,
        **vars(found),
        categories=like.categories,
        annotations=file,
        keys=Keys(images.keys.images, LABELS_KEY),
    )


def _joined(split: DetectionSplit, labelled: DetectionSplit) -> DetectionSplit:
    """The training images with labels of their own, and behind them those labelled by a file."""
    records, images = labelled.records, split.images
    if labelled.images is not images:
        records = tuple(replace(r, file_name=f"{BESIDE}{r.file_name}") for r in records)
        images = replace(images, beside=labelled.images)
    return replace(
        split,
        records=(*split.records, *records),
        images=images,
        left_out=(),
        parts=(split, labelled),
    )


def unlabelled_place(
    config: UnlabelledConfig, on_progress: OnProgress | None = None
) -> SplitConfig:
    """Where images without labels are that have files of their own.

    Args:
        config: not ``rest_of_train``; digit scenes are written where they do not exist yet.
        on_progress: called while files are written.

    Raises:
        UserError: digit scenes cannot be written.
    """
    if config.digit_scenes is not None:
        return write_digit_scenes(config.digit_scenes, on_progress, verify=["train"])["train"]
    if config.place is None:
        raise ValueError("the rest of the training images has no place of its own")
    return config.place


def read_split(
    name: str,
    split: SplitConfig,
    on_progress: OnProgress | None = None,
    *,
    fetch: bool = True,
    keys: Keys | None = None,
) -> DetectionSplit:
    """Read one split for training or evaluation, naming in the log what was dropped.

    Args:
        name: train, validation or test.
        split: where it is; what a URL names is fetched into this machine's cache.
        on_progress: called while files are fetched.
        fetch: False leaves a URL's images where they are and only makes sure that they exist.
        keys: what error texts name; by default those of a recipe.

    Raises:
        UserError: the annotations cannot be used, or images are missing.
    """
    parsed = parse_split(name, split, on_progress, fetch=fetch, keys=keys)
    missing = missing_problem(parsed)
    if missing is not None:
        raise UserError(missing)
    for text in [*cleaning_texts(parsed.cleaning, "crowd"), *parsed.warnings]:
        _LOGGER.warning("%s: %s", parsed.annotations, text)
    return parsed


def parse_split(
    name: str,
    split: SplitConfig,
    on_progress: OnProgress | None = None,
    *,
    fetch: bool = True,
    keys: Keys | None = None,
) -> DetectionSplit:
    """Read one split whose images may be missing; ``check_data`` names them one by one.

    Arguments are those of ``read_split``.

    Raises:
        UserError: the annotations cannot be used, or there is no image folder.
    """
    keys = keys or Keys.of_split(name)
    if isinstance(split.images, Path) and not split.images.is_dir():
        which = "of the images"
        if split.images != split.annotations:
            which = f"that the file names in {split.annotations} are relative to"
        raise UserError(
            f"{keys.images}: {split.images} is not a folder; expected the folder {which}"
        )
    try:
        with local_file(split.annotations, on_progress) as place:
            title, raw = _read(place, name, split)
    except UserError as error:
        key = keys.images if split.annotations == split.images else keys.annotations
        raise type(error)(f"{key}: {error}") from error
    folder = raw.folder or split.images
    if folder is None:
        raise UserError(
            f"{keys.images} is missing: expected the folder that the file names in "
            f"{split.annotations} are relative to"
        )
    names = [image.file_name for image in raw.images]
    images = open_folder(folder, names, on_progress, fetch=fetch, follow_links=split.follow_links)
    records, cleaning = clean(raw)
    return DetectionSplit(
        name=name,
        format=title,
        categories=raw.categories,
        records=records,
        cleaning=cleaning,
        own_ids=raw.own_ids,
        warnings=raw.warnings,
        images=images,
        annotations=split.annotations,
        digest=_digest(raw.digest, names, images),
        keys=keys,
    )


def _read(place: Path, name: str, split: SplitConfig) -> tuple[str, Annotations]:
    """The format's title, and what it reads; ``place`` holds the annotations on this machine."""
    local = isinstance(split.annotations, Path)
    if name == UNLABELLED:
        return UnlabelledImages.title, UnlabelledImages().read(Source(place, split.images))
    which, found = find_format(split.format, place if local else split.annotations)
    subset = split.subset or _SUBSETS.get(name, name)
    raw = found.read(Source(place, split.images, subset, chosen=split.subset is not None))
    if not raw.images:
        raise UserError(
            f"{place}: {found.title} without an image in '{subset}'; expected at least one"
        )
    if split.format == AUTO and which != "coco":
        _LOGGER.info("%s: read as %s", place, found.title)
    return found.title, raw


def _digest(annotations: str, names: Sequence[str], images: ImageFolder) -> str:
    """The same wherever the files are."""
    digest = hashlib.sha256(annotations.encode())
    for name in names:
        size = images.size(name)
        digest.update(
            f"{name}\0{-1 if size is None else size}\0".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def missing_problem(split: DetectionSplit) -> str | None:
    """What to do about images whose file does not exist, with the file that may be meant."""
    missing = [r for r in split.records if split.images.size(r.file_name) is None]
    if not missing:
        return None
    shown = [f"{record.file_name} (image id {record.id})" for record in missing[:SHOWN]]
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    advice = _name_advice(split, missing[0].file_name)
    return (
        f"{split.keys.annotations} {split.annotations}: {len(missing)} of {len(split.records)} "
        f"images are not in {split.images}: {', '.join(shown)}{more}. Expected every file_name "
        f"below that folder: {advice}correct {split.keys.images}, or take the images out of the "
        "annotation file"
    )


def _name_advice(split: DetectionSplit, name: str) -> str:
    """Why ``name`` is not found though a file of nearly that name may be there."""
    if "\\" in name:
        return f"{name} has backslashes, which part folders on Windows alone: write '/' instead; "
    folder, last = os.path.split(name)
    if split.images.size(last) is not None:
        return f"{last} is there, without {folder}/: point at the folder above, or shorten names; "
    if not isinstance(split.images.location, Path):
        return ""
    with suppress(OSError):
        for other in os.listdir(split.images.path(folder)):
            if _plain(other) == _plain(last):
                return (
                    f"{other!r} is there: names differ in case, spaces or the Unicode form of "
                    "accents; rename one; "
                )
    return ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()
