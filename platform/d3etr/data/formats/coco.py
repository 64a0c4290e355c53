"""COCO detection files, checked entry by entry."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from d3etr.data.annotations import (
    Annotations,
    Category,
    ImageEntry,
    ObjectEntry,
    Problems,
    Source,
    file_name_problem,
    is_number,
    is_text,
)
from d3etr.errors import UserError

_KEYS = ("images", "annotations", "categories")
_FOREIGN_FLAGS = ("ignore", "ignored", "difficult", "is_crowd", "isCrowd")
"""What other formats set an object aside by; in COCO files it has no effect."""


class CocoFormat:
    """A COCO detection JSON: one file for all images of a split."""

    title = "COCO detection file"

    def places(self, source: Source) -> list[Path]:
        """The file."""
        return [source.annotations]

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is named like one."""
        return place.suffix.lower() == ".json"

    def read(self, source: Source) -> Annotations:
        """Read and check the file; its images are in the configured folder.

        Raises:
            UserError: the file is missing, is not JSON, or has entries that cannot be used; the
                text names file, key, image or annotation id, and what was expected.
        """
        if source.chosen:
            raise UserError(
                f"{source.annotations}: found the subset '{source.subset}', but a COCO file is one "
                "split as a whole: take 'subset' out, or name the file of that subset"
            )
        path = source.annotations
        content, digest = _load(path)
        problems = Problems(path, self.title)
        categories = _categories(content["categories"], problems)
        images = _images(content["images"], problems)
        objects = _annotations(
            content["annotations"],
            {image.id: index for index, image in enumerate(images)},
            {category.id: index for index, category in enumerate(categories)},
            problems,
        )
        problems.raise_if_any()
        return Annotations(tuple(categories), images, objects, digest, own_ids=True)


def _load(path: Path) -> tuple[dict[str, list[Any]], str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"annotation file {path} cannot be read ({error.strerror or error}): "
            "expected a COCO detection JSON; check the path"
        ) from error
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: broken JSON ({error}): expected a COCO detection file; "
            "it may be cut off, so copy or export it again"
        ) from error
    return _with_lists(path, content), hashlib.sha256(raw).hexdigest()


def _with_lists(path: Path, content: object) -> dict[str, list[Any]]:
    expected = f"a COCO detection file is an object with the lists {', '.join(_KEYS)}"
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__} at the top; {expected}")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        found = ", ".join(map(repr, list(content)[:12])) or "nothing"
        raise UserError(f"{path}: missing key {', '.join(missing)} (found {found}); {expected}")
    for key in _KEYS:
        if not isinstance(content[key], list):
            kind = type(content[key]).__name__
            raise UserError(f"{path}: '{key}' is a {kind}; {expected}")
    return content


_ID = "an integer id (63 bits at most, and not as a float above 2**53, which has lost digits)"


def _integer(value: object) -> int | None:
    """``value`` as int of at most 63 bits, or None; 640.0 counts, True and "640" do not."""
    if isinstance(value, bool):
        return None
    # A larger float has lost digits: it may be another id than the one that was written.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    # Arrays hold ids as int64.
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _entry_problem(entry: object, keys: tuple[str, ...]) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, found {entry!r:.60}"
    missing = [key for key in keys if key not in entry]
    return f"missing key {', '.join(missing)}" if missing else None


def _categories(entries: list[Any], problems: Problems) -> list[Category]:
    found: dict[int, Category] = {}
    names: dict[str, int] = {}
    for position, entry in enumerate(entries):
        where = f"categories[{position}]"
        problem = _entry_problem(entry, ("id", "name"))
        if problem:
            problems.add(f"{where}: {problem}")
            continue
        number, name = _integer(entry["id"]), entry["name"]
        if number is None or not isinstance(name, str) or not name or not is_text(name):
            problems.add(f"{where}: expected {_ID} and a name, found {entry!r:.80}")
        elif number in found:
            problems.add(f"{where}: category id {number} is used twice; ids must be unique")
        elif name in names:
            problems.add(f"{where}: name {name!r} is also category {names[name]}'s; rename one")
        else:
            found[number], names[name] = Category(number, name), number
    if not entries:
        problems.add("'categories' is empty: expected at least one class of objects")
    return [found[number] for number in sorted(found)]


def _images(entries: list[Any], problems: Problems) -> list[ImageEntry]:
    found: dict[int, ImageEntry] = {}
    for position, entry in enumerate(entries):
        problem = _entry_problem(entry, ("id", "file_name", "width", "height"))
        number = _integer(entry["id"]) if problem is None else None
        where = f"images[{position}]" + ("" if number is None else f" (id {number})")
        problem = problem or _image_problem(entry, number)
        if number is not None and number in found:
            problem = (
                f"image id {number} is used twice "
                f"({found[number].file_name!r} and {entry['file_name']!r}); ids must be unique"
            )
        if problem or number is None:
            problems.add(f"{where}: {problem}")
            continue
        found[number] = ImageEntry(
            number, entry["file_name"], int(entry["width"]), int(entry["height"])
        )
    if not entries:
        problems.add("'images' is empty: expected at least one image")
    return list(found.values())


def _image_problem(entry: dict[str, Any], number: int | None) -> str | None:
    if number is None:
        return f"id is {entry['id']!r:.40}; expected {_ID}"
    for key in ("width", "height"):
        side = _integer(entry[key])
        if side is None or side < 1:
            return f"{key} is {entry[key]!r:.40}; expected whole pixels above 0"
    return file_name_problem(entry["file_name"])


def _annotations(
    entries: list[Any],
    image_index: dict[int, int],
    labels: dict[int, int],
    problems: Problems,
) -> list[ObjectEntry]:
    rows: list[ObjectEntry] = []
    for position, entry in enumerate(entries):
        problem = _entry_problem(entry, ("image_id", "category_id", "bbox"))
        number = _integer(entry.get("id")) if isinstance(entry, dict) else None
        if problem is None:
            problem = _annotation_problem(entry, image_index, labels)
        if problem:
            where = f"annotations[{position}]" + ("" if number is None else f" (id {number})")
            problems.add(f"{where}: {problem}")
            continue
        identity = position if number is None else number
        index, label = image_index[entry["image_id"]], labels[entry["category_id"]]
        area, crowd = entry.get("area"), bool(entry.get("iscrowd"))
        rows.append(
            ObjectEntry(
                identity,
                index,
                label,
                tuple(entry["bbox"]),
                area=None if area is None else _any_float(area),
                crowd=crowd,
                foreign_flag=not crowd and any(_is_set(entry.get(k)) for k in _FOREIGN_FLAGS),
            )
        )
    return rows


def _annotation_problem(
    entry: dict[str, Any], image_index: dict[int, int], labels: dict[int, int]
) -> str | None:
    if _integer(entry["image_id"]) not in image_index:
        return f"image_id {entry['image_id']!r:.40} is not among 'images'"
    if _integer(entry["category_id"]) not in labels:
        known = ", ".join(map(str, list(labels)[:12])) + (", ..." if len(labels) > 12 else "")
        return (
            f"category_id {entry['category_id']!r:.40} is not among 'categories' "
            f"(known ids: {known}; image id {entry['image_id']})"
        )
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return f"bbox is {box!r:.60}; expected [x, y, width, height] in pixels"
    if not isinstance(entry.get("area"), int | float | None):
        return f"area is {entry['area']!r:.40}; expected square pixels"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {entry['iscrowd']!r:.40}; expected 0 or 1"
    return None


def _any_float(value: float) -> float:
    """``value``, also where it is an integer that no float holds."""
    return float(value) if not abs(value) > 1e300 else math.inf


def _is_set(flag: object) -> bool:
    return flag in (1, "1", "true", "True", "yes")
