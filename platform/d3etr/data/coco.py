"""One split of a COCO-format data set: images, cleaned boxes, and a digest of the content."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3etr.config.data import SplitConfig
from d3etr.config.location import Location, Url
from d3etr.data.coco_json import Category, RawAnnotations, RawImage, read_annotations
from d3etr.data.progress import Progress
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.storage.fetch import local_file
from d3etr.storage.images import ImageFolder, LocalFolder, open_folder

__all__ = [
    "Category",
    "Cleaning",
    "DetectionSplit",
    "ImageRecord",
    "Keys",
    "missing_images",
    "missing_text",
    "parse_split",
    "read_split",
    "require_same_categories",
    "shown_ids",
]

_LOGGER = get_logger(__name__)
_SHOWN_IDS = 5


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and everything annotated in it; n annotations, crowds included.

    Attributes:
        id: the annotation file's image id.
        file_name: relative to the split's image folder.
        width: pixels, as annotated.
        height: pixels, as annotated.
        labels: [n] contiguous labels, indices into the split's categories.
        boxes_xywh: [n, 4] pixels, as annotated: what evaluation compares with. May reach over
            the image's edge, as COCO's own tools leave it.
        areas: [n] square pixels, what evaluation sorts small, medium and large by.
        crowd: [n] bool; crowds are no training targets and are ignored in evaluation.
    """

    id: int
    file_name: str
    width: int
    height: int
    labels: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]

    @property
    def boxes_xyxy(self) -> NDArray[np.float64]:
        """[n, 4] corners of ``boxes_xywh``."""
        return to_xyxy(self.boxes_xywh)

    def objects(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Training targets: labels [m] and boxes_xyxy [m, 4], clipped to the image, no crowds."""
        single = ~self.crowd
        limits = np.array([self.width, self.height] * 2, dtype=np.float64)
        return self.labels[single], np.clip(self.boxes_xyxy[single], 0.0, limits)


@dataclass(frozen=True)
class Cleaning:
    """What reading did to boxes; every entry is an annotation id.

    Attributes:
        zero_size: dropped, because width or height is not above 0.
        outside: dropped, because no part lies within the image.
        clipped: kept; their training target is the part within the image.
        crowd: kept for evaluation only.
        implausible_area: kept; evaluation sorts them small, medium and large by width x height.
        foreign_flag: kept as objects, though marked to be ignored in a way that is not COCO's.
    """

    zero_size: tuple[int, ...] = ()
    outside: tuple[int, ...] = ()
    clipped: tuple[int, ...] = ()
    crowd: tuple[int, ...] = ()
    implausible_area: tuple[int, ...] = ()
    foreign_flag: tuple[int, ...] = ()

    def texts(self, *names: str) -> list[str]:
        """What was done, a sentence for each of the fields ``names`` that is not empty."""
        found = {name: getattr(self, name) for name in names}
        return [
            f"{len(ids)} boxes {_DONE[name]} (annotation ids {shown_ids(ids)})"
            for name, ids in found.items()
            if ids
        ]


_DONE = {
    "zero_size": "dropped: width or height is not above 0",
    "outside": "dropped: outside of the image",
    "clipped": "clipped to the image for training",
    "implausible_area": "with an 'area' that is not above 0 or is larger than the box: width x "
    "height is taken instead",
    "foreign_flag": "marked 'ignore', 'difficult' or the like, which has no effect in COCO files: "
    "they count as objects; 'iscrowd': 1 would set them aside",
}


class Keys(NamedTuple):
    """Configuration keys, or the flags of a command, that say where a split is."""

    images: str
    annotations: str

    @classmethod
    def of_split(cls, name: str) -> Keys:
        """Those of a recipe."""
        return cls(f"data.{name}.images", f"data.{name}.annotations")


@dataclass(frozen=True, eq=False)
class DetectionSplit:
    """A parsed annotation file with its images.

    Attributes:
        name: train, validation or test.
        images: the folder that file names are relative to.
        annotations: the COCO JSON, as configured.
        categories: by rising id; a contiguous label is an index into this tuple.
        records: one per image, in the file's order.
        cleaning: what was dropped, clipped or set aside.
        digest: sha256, hex, over the annotation file and the images' names and file sizes.
        keys: where a person says what ``images`` and ``annotations`` are, for error texts.
    """

    name: str
    images: ImageFolder
    annotations: Location
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    cleaning: Cleaning
    digest: str
    keys: Keys

    def path(self, record: ImageRecord) -> Path:
        """Where the image of ``record`` lies on this machine."""
        return self.images.path(record.file_name)


def read_split(
    name: str,
    split: SplitConfig,
    progress: Progress | None = None,
    *,
    fetch: bool = True,
    keys: Keys | None = None,
) -> DetectionSplit:
    """Read one split for training or evaluation, saying in the log what was dropped.

    Args:
        name: train, validation or test.
        split: where it is; what a URL names is fetched into this machine's cache.
        progress: told of the fetching.
        fetch: False leaves a URL's images where they are and only makes sure that they exist.
        keys: what error texts name; by default those of a recipe.

    Raises:
        UserError: the annotation file cannot be used, or images are missing.
    """
    parsed = parse_split(name, split, progress, fetch=fetch, keys=keys)
    missing = missing_images(parsed)
    if missing:
        raise UserError(missing_text(parsed, missing))
    _log_cleaning(parsed)
    return parsed


def parse_split(
    name: str,
    split: SplitConfig,
    progress: Progress | None = None,
    *,
    fetch: bool = True,
    keys: Keys | None = None,
) -> DetectionSplit:
    """Read one split whose images may be missing; ``check_data`` names them one by one.

    Arguments are those of ``read_split``.

    Raises:
        UserError: the annotation file cannot be used, or there is no image folder.
    """
    keys = keys or Keys.of_split(name)
    if not isinstance(split.images, Url) and not split.images.is_dir():
        raise UserError(
            f"{keys.images}: {split.images} is not a folder; expected the folder that the "
            f"file names in {split.annotations} are relative to"
        )
    try:
        with local_file(split.annotations, progress) as file:
            raw = read_annotations(file)
    except UserError as error:
        raise type(error)(f"{keys.annotations}: {error}") from error
    records, cleaning = _clean(raw)
    names = [image.file_name for image in raw.images]
    images = open_folder(
        split.images, names, progress, fetch=fetch, follow_links=split.follow_links
    )
    return DetectionSplit(
        name=name,
        images=images,
        annotations=split.annotations,
        categories=raw.categories,
        records=records,
        cleaning=cleaning,
        digest=_digest(raw, images),
        keys=keys,
    )


def missing_images(split: DetectionSplit) -> tuple[ImageRecord, ...]:
    """Records whose image file does not exist."""
    return tuple(record for record in split.records if split.images.size(record.file_name) is None)


def require_same_categories(expected: DetectionSplit, found: DetectionSplit) -> None:
    """Check that a label means the same class in both splits.

    Raises:
        UserError: ids or names differ.
    """
    if expected.categories == found.categories:
        return
    ours = {(category.id, category.name) for category in expected.categories}
    theirs = {(category.id, category.name) for category in found.categories}
    raise UserError(
        f"{found.annotations} ({found.name}) has other categories than {expected.annotations} "
        f"({expected.name}): only in {expected.name}: {_category_list(ours - theirs)}; only in "
        f"{found.name}: {_category_list(theirs - ours)}. Expected the same ids and names: export "
        "all splits with one category list"
    )


def _category_list(categories: set[tuple[int, str]]) -> str:
    texts = [f"{name} (id {number})" for number, name in sorted(categories)]
    return ", ".join(texts[:_SHOWN_IDS]) + (", ..." if len(texts) > _SHOWN_IDS else "") or "none"


def to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 4] corners of boxes given by corner, width and height."""
    low = boxes_xywh[:, :2]
    return np.concatenate([low, low + boxes_xywh[:, 2:]], axis=1)


def _clean(raw: RawAnnotations) -> tuple[tuple[ImageRecord, ...], Cleaning]:
    """Drop what is no box and sort the rest by image."""
    boxes = to_xyxy(raw.boxes_xywh)
    sizes = np.array([(image.width, image.height) for image in raw.images], dtype=np.float64)
    limits = np.tile(sizes[raw.image_index], 2)
    inside = np.clip(boxes, 0.0, limits)
    zero = (raw.boxes_xywh[:, 2:] <= 0).any(1)
    outside = ~zero & (inside[:, 2:] <= inside[:, :2]).any(1)
    kept = ~(zero | outside)
    clipped = kept & (inside != boxes).any(1) & ~raw.crowd
    masks = {
        "zero_size": zero,
        "outside": outside,
        "clipped": clipped,
        "crowd": kept & raw.crowd,
        "implausible_area": kept & raw.implausible_area,
        "foreign_flag": kept & raw.foreign_flag,
    }
    cleaning = Cleaning(**{name: tuple(raw.ids[mask].tolist()) for name, mask in masks.items()})
    order = np.flatnonzero(kept)[np.argsort(raw.image_index[kept], kind="stable")]
    ends = np.cumsum(np.bincount(raw.image_index[order], minlength=len(raw.images)))
    parts = np.split(order, ends[:-1])
    records = tuple(
        _record(raw, image, part) for image, part in zip(raw.images, parts, strict=True)
    )
    return records, cleaning


def _record(raw: RawAnnotations, image: RawImage, part: NDArray[np.intp]) -> ImageRecord:
    return ImageRecord(
        id=image.id,
        file_name=image.file_name,
        width=image.width,
        height=image.height,
        labels=raw.labels[part],
        boxes_xywh=raw.boxes_xywh[part],
        areas=raw.areas[part],
        crowd=raw.crowd[part],
    )


def _digest(raw: RawAnnotations, images: ImageFolder) -> str:
    """The same wherever the files are."""
    digest = hashlib.sha256(raw.digest.encode())
    for image in raw.images:
        found = images.size(image.file_name)
        size = -1 if found is None else found
        digest.update(f"{image.file_name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def missing_text(split: DetectionSplit, missing: Sequence[ImageRecord]) -> str:
    """What to say about images that are not there, with what may be meant by their names."""
    shown = [f"{record.file_name} (image id {record.id})" for record in missing[:_SHOWN_IDS]]
    more = f" and {len(missing) - _SHOWN_IDS} more" if len(missing) > _SHOWN_IDS else ""
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
    if not isinstance(split.images, LocalFolder):
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


def _log_cleaning(split: DetectionSplit) -> None:
    for text in split.cleaning.texts(*_DONE):
        _LOGGER.warning("%s: %s", split.annotations, text)


def shown_ids(ids: Iterable[int]) -> str:
    """The first few of ``ids``."""
    texts = [str(number) for number in ids]
    return ", ".join(texts[:_SHOWN_IDS]) + (", ..." if len(texts) > _SHOWN_IDS else "")
