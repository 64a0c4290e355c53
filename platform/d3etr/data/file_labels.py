"""Labels of images that have none of their own: a COCO file's boxes, found by file name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from d3etr.config.location import Location
from d3etr.data.annotations import Source
from d3etr.data.formats.coco import CocoFormat
from d3etr.data.records import Cleaning, ImageRecord, clean, shown_ids
from d3etr.errors import UserError
from d3etr.progress import OnProgress
from d3etr.storage.fetch import local_file

LABELS_KEY = "data.unlabelled.labels"


@dataclass(frozen=True)
class FileLabels:
    """Images with the labels that a file has for them.

    Attributes:
        records: the images that it lists, with its boxes.
        left_out: the others, of which nothing is known.
        cleaning: what was done to boxes.
        warnings: which images are on one side only, a sentence each.
        format: of the file.
    """

    records: tuple[ImageRecord, ...]
    left_out: tuple[ImageRecord, ...]
    cleaning: Cleaning
    warnings: tuple[str, ...]
    format: str = CocoFormat.title


def labels_of(
    records: Sequence[ImageRecord],
    place: Location,
    names: Sequence[str],
    on_progress: OnProgress | None = None,
) -> FileLabels:
    """The labels that a file has for images, which it finds by their file names.

    Args:
        records: images without labels, names relative to their folder.
        place: the COCO file.
        names: of the classes, by label; ids may be others in the file.
        on_progress: called while the file is fetched.

    Raises:
        UserError: the file cannot be used, has other classes, lists none of the images, an image
            of another size or one twice; or there are no images.
    """
    if not records:
        raise UserError(
            f"{LABELS_KEY} {place} has no effect: there is no image without labels. Expected a "
            "data.labelled_share that leaves some, or no data.unlabelled"
        )
    try:
        with local_file(place, on_progress) as file:
            raw = CocoFormat().read(Source(file))
    except UserError as error:
        raise type(error)(f"{LABELS_KEY}: {error}") from error
    theirs = [category.name for category in raw.categories]
    if theirs != [*names]:
        there, here = _differing(theirs, names)
        raise UserError(
            f"{LABELS_KEY} {place} has the classes {there}, the training annotations {here}. "
            "Expected the same names in the same order"
        )
    listed, cleaning = clean(raw)
    by_name = _by_name(listed, place)
    found = tuple(_labelled(r, by_name[r.file_name], place) for r in records if _in(r, by_name))
    if not found:
        raise UserError(
            f"{LABELS_KEY} {place}: none of its {len(listed)} images (such as "
            f"{listed[0].file_name!r}) is one of the {len(records)} without labels (such as "
            f"{records[0].file_name!r}). Expected names relative to their folder, as 'd3etr "
            "pseudo-label' writes them"
        )
    left_out = tuple(record for record in records if not _in(record, by_name))
    warnings = []
    if len(found) < len(by_name):
        count = f"{len(by_name) - len(found)} of {len(by_name)}"
        warnings.append(f"{count} images are not among those without labels and are left out")
    if left_out:
        count = f"{len(left_out)} of {len(records)}"
        warnings.append(f"{count} images without labels are not in it and are left out")
    return FileLabels(found, left_out, cleaning, tuple(warnings))


def _by_name(listed: Sequence[ImageRecord], place: Location) -> dict[str, ImageRecord]:
    counts = Counter(record.file_name for record in listed)
    again = [name for name, count in counts.items() if count > 1]
    if again:
        raise UserError(
            f"{LABELS_KEY} {place} lists images more than once: {shown_ids(again)}. Expected each "
            "once, with all of its boxes"
        )
    return {record.file_name: record for record in listed}


def _differing(theirs: Sequence[str], ours: Sequence[str]) -> tuple[str, str]:
    """The first names of two lists from where they differ on."""
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))
    )
    begin = "..., " if same else ""
    there, here = (f"{begin}{shown_ids(names[same:]) or 'and no more'}" for names in (theirs, ours))
    return there, here


def _in(record: ImageRecord, by_name: dict[str, ImageRecord]) -> bool:
    return record.file_name in by_name


def _labelled(image: ImageRecord, labels: ImageRecord, place: Location) -> ImageRecord:
    ours, theirs = (image.width, image.height), (labels.width, labels.height)
    if ours != theirs:
        raise UserError(
            f"{LABELS_KEY} {place}: {image.file_name} has {theirs[0]} x {theirs[1]} pixels there, "
            f"the image {ours[0]} x {ours[1]}, so its boxes cannot be trusted: make the file anew"
        )
    return replace(labels, id=image.id)
