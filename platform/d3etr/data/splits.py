"""The splits of a data set: their images, cleaned annotations, and a digest of the content."""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.location import Location, Url
from d3etr.data.annotations import Category, DataFormat, Source
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.fingerprint import fingerprint
from d3etr.data.formats import AUTO, find_format
from d3etr.data.records import SHOWN, Cleaning, ImageRecord, clean, shown_ids
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress
from d3etr.storage.fetch import local_file
from d3etr.storage.images import ImageFolder, LocalFolder, open_folder

_LOGGER = get_logger(__name__)
SPLIT_NAMES: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
_SUBSETS = {"validation": "val"}
"""What data sets call a split, where it is not our own name."""
_KEPT = 4
"""Annotations that stay in memory: of the three splits of a run, and one more."""


class Keys(NamedTuple):
    """Configuration keys, or the flags of a command, that name the places of a split."""

    images: str
    annotations: str

    @classmethod
    def of_split(cls, name: str) -> Keys:
        """Those of a recipe."""
        return cls(f"data.{name}.images", f"data.{name}.annotations")


@dataclass(frozen=True, eq=False)
class ParsedAnnotations:
    """What the annotations of a split hold, without their images.

    Attributes:
        format: what people call it.
        categories: by rising id; a contiguous label is an index into this tuple.
        records: one per image, in the annotations' order.
        cleaning: what was dropped, clipped or set aside.
        own_ids: whether ids are the annotations' own; else texts name files.
        places: where annotations are that cleaning names; none where their ids are their own.
        warnings: what may be wrong, a sentence each.
    """

    format: str
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    cleaning: Cleaning
    own_ids: bool
    places: Mapping[int, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class DetectionSplit(ParsedAnnotations):
    """Parsed annotations with their images.

    Attributes:
        name: train, validation or test.
        images: the folder that file names are relative to.
        annotations: the file or folder, as configured.
        digest: sha256, hex, over the annotations and the images' names and file sizes.
        keys: what error texts call the places of ``images`` and ``annotations``.
    """

    name: str
    images: ImageFolder
    annotations: Location
    digest: str
    keys: Keys

    def path(self, record: ImageRecord) -> Path:
        """Where the image of ``record`` lies on this machine."""
        return self.images.path(record.file_name)

    def shown_images(self, ids: Sequence[int]) -> str:
        """The first few images of ``ids``, for texts."""
        if self.own_ids:
            return f"image ids {shown_ids(ids)}"
        wanted = set(ids[:SHOWN])
        names = [record.file_name for record in self.records if record.id in wanted]
        return f"images {', '.join(names)}{', ...' if len(ids) > SHOWN else ''}"


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
    """Read one split of ``data``.

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
    return read_split(name, splits[name], on_progress, fetch=fetch)


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
    missing = missing_images(parsed)
    if missing:
        raise UserError(missing_text(parsed, missing))
    for text in [*parsed.cleaning.texts(parsed.places), *parsed.warnings]:
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
        raise UserError(
            f"{keys.images}: {split.images} is not a folder; expected the folder that the "
            f"file names in {split.annotations} are relative to"
        )
    try:
        with local_file(split.annotations, on_progress) as place:
            found, raw = _read_once(place, name, split)
    except UserError as error:
        raise type(error)(f"{keys.annotations}: {error}") from error
    folder = raw.folder or split.images
    if folder is None:
        raise UserError(
            f"{keys.images} is missing: expected the folder that the file names in "
            f"{split.annotations} are relative to"
        )
    names = [record.file_name for record in found.records]
    images = open_folder(folder, names, on_progress, fetch=fetch, follow_links=split.follow_links)
    return DetectionSplit(
        **vars(found),
        name=name,
        images=images,
        annotations=split.annotations,
        digest=_digest(raw.digest, names, images),
        keys=keys,
    )


class _Origin(NamedTuple):
    """Of parsed annotations: sha256 of what was read, and the folder that a format names."""

    digest: str
    folder: Path | None


_Known = tuple[tuple[str | None, ...], tuple[ParsedAnnotations, _Origin]]
_READ: OrderedDict[tuple[str, Source], _Known] = OrderedDict()
"""Annotations that this process has read, the oldest first, with fingerprints of their files."""
_READING = threading.Lock()


def _read_once(place: Path, name: str, split: SplitConfig) -> tuple[ParsedAnnotations, _Origin]:
    """Read annotations unless this process has already, and their files are unchanged."""
    local = isinstance(split.annotations, Path)
    which, found = find_format(split.format, place if local else split.annotations)
    source = source_of(name, split, place)
    with _READING:
        prints = tuple(fingerprint(each) for each in found.places(source))
        known = _READ.pop((which, source), None)
        if known is None or known[0] != prints or None in prints:
            known = prints, _read(found, source)
            if split.format == AUTO and which != "coco":
                _LOGGER.info("%s: read as %s", split.annotations, found.title)
        _READ[which, source] = known
        while len(_READ) > _KEPT:
            _READ.popitem(last=False)
        return known[1]


def _read(found: DataFormat, source: Source) -> tuple[ParsedAnnotations, _Origin]:
    raw = found.read(source)
    if not raw.images:
        raise UserError(
            f"{source.annotations}: {found.title} without an image in '{source.subset}'; expected "
            "at least one"
        )
    records, cleaning, places = clean(raw)
    parsed = ParsedAnnotations(
        found.title, raw.categories, records, cleaning, raw.own_ids, places, raw.warnings
    )
    return parsed, _Origin(raw.digest, raw.folder)


def source_of(name: str, split: SplitConfig, place: Path) -> Source:
    """What a format reads.

    Args:
        name: train, validation or test.
        split: where it is.
        place: its annotations on this machine.
    """
    subset = split.subset or _SUBSETS.get(name, name)
    return Source(place, split.images, subset, chosen=split.subset is not None)


def places_of(name: str, split: SplitConfig) -> list[Location]:
    """The files and folders that a split's content depends on; nothing of it is read.

    Raises:
        UserError: nobody knows the format.
    """
    images = [] if split.images is None else [split.images]
    if isinstance(split.annotations, Url):
        return [split.annotations, *images]
    _, found = find_format(split.format, split.annotations)
    return [*found.places(source_of(name, split, split.annotations)), *images]


def _digest(annotations: str, names: Sequence[str], images: ImageFolder) -> str:
    """The same wherever the files are."""
    digest = hashlib.sha256(annotations.encode())
    for name in names:
        size = images.size(name)
        digest.update(
            f"{name}\0{-1 if size is None else size}\0".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


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
    wanted = {(category.id, category.name) for category in expected.categories}
    there = {(category.id, category.name) for category in found.categories}
    raise UserError(
        f"{found.annotations} ({found.name}) has other categories than {expected.annotations} "
        f"({expected.name}): only in {expected.name}: {_category_list(wanted - there)}; only in "
        f"{found.name}: {_category_list(there - wanted)}. Expected the same ids and names: export "
        "all splits with one category list"
    )


def _category_list(categories: set[tuple[int, str]]) -> str:
    texts = [f"{name} (id {number})" for number, name in sorted(categories)]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "") or "none"


def missing_text(split: DetectionSplit, missing: Sequence[ImageRecord]) -> str:
    """The error text about missing images, with the file that may be meant."""
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
