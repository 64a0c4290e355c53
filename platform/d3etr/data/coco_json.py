"""The text of a COCO detection file, checked entry by entry and laid out as flat arrays.

I images, A annotations, C categories.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from d3etr.errors import UserError

_SHOWN_PROBLEMS = 8
_KEYS = ("images", "annotations", "categories")
_FOREIGN_FLAGS = ("ignore", "ignored", "difficult", "is_crowd", "isCrowd")
"""What other formats set an object aside by; in COCO files it has no effect."""


@dataclass(frozen=True)
class Category:
    """One class of objects.

    Attributes:
        id: as in the annotation file; any integer, gaps allowed.
        name: what people call it.
    """

    id: int
    name: str


@dataclass(frozen=True)
class RawImage:
    """One entry of ``images``; width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class RawAnnotations:
    """A whole annotation file.

    Attributes:
        categories: C of them, by rising id; the index here is the label.
        images: I of them, in the file's order.
        ids: [A] annotation ids (the position where an entry has none).
        image_index: [A] index into ``images``.
        labels: [A] index into ``categories``.
        boxes_xywh: [A, 4] pixels, as annotated.
        areas: [A] square pixels: the outline's where the file has a plausible one, else
            width x height.
        implausible_area: [A] bool: the file has an ``area`` that cannot be this box's.
        crowd: [A] bool.
        foreign_flag: [A] bool: marked to be ignored in a way that is not COCO's.
        digest: sha256 of the file's bytes, hex.
    """

    categories: tuple[Category, ...]
    images: tuple[RawImage, ...]
    ids: NDArray[np.int64]
    image_index: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    implausible_area: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    foreign_flag: NDArray[np.bool_]
    digest: str


class _Problems:
    """Collects what is wrong with a file, so that one error names it all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        self.texts.append(text)

    def raise_if_any(self) -> None:
        if not self.texts:
            return
        shown = [f"  - {text}" for text in self.texts[:_SHOWN_PROBLEMS]]
        if len(self.texts) > _SHOWN_PROBLEMS:
            shown.append(f"  - and {len(self.texts) - _SHOWN_PROBLEMS} more")
        raise UserError("\n".join([f"{self.path}: not a usable COCO detection file", *shown]))


def read_annotations(path: Path) -> RawAnnotations:
    """Read and check one COCO detection JSON.

    Raises:
        UserError: the file is missing, is not JSON, or has entries that cannot be used; the
            text names file, key, image or annotation id, and what was expected.
    """
    content, digest = _load(path)
    problems = _Problems(path)
    categories = _categories(content["categories"], problems)
    images = _images(content["images"], problems)
    rows = _annotations(
        content["annotations"],
        {image.id: index for index, image in enumerate(images)},
        {category.id: index for index, category in enumerate(categories)},
        problems,
    )
    problems.raise_if_any()
    # Ids may be above 2**53, where float64 has gaps.
    integers = np.array([row.integers for row in rows], dtype=np.int64).reshape(-1, 3)
    boxes = np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4)
    areas, implausible = _plausible_areas(boxes, [row.area for row in rows])
    return RawAnnotations(
        categories=tuple(categories),
        images=tuple(images),
        ids=integers[:, 0],
        image_index=integers[:, 1],
        labels=integers[:, 2],
        boxes_xywh=boxes,
        areas=areas,
        implausible_area=implausible,
        crowd=np.array([row.crowd for row in rows], dtype=np.bool_),
        foreign_flag=np.array([row.foreign_flag for row in rows], dtype=np.bool_),
        digest=digest,
    )


def _plausible_areas(
    boxes_xywh: NDArray[np.float64], given: list[float | None]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Areas [A] to evaluate by, and [A] whether the file's own cannot be its box's.

    An outline is smaller than its box, often by far. It seems larger where sides are rounded,
    or where width is counted from pixel to pixel: by a pixel each at most.
    """
    own = np.array([math.nan if area is None else area for area in given], dtype=np.float64)
    sides = np.maximum(boxes_xywh[:, 2:], 0)
    plausible = (own > 0) & (own <= 1.01 * np.prod(sides + 1, axis=1))
    lacks = np.array([area is None for area in given], dtype=np.bool_)
    return np.where(plausible, own, np.prod(sides, axis=1)), ~(plausible | lacks)


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


def _categories(entries: list[Any], problems: _Problems) -> list[Category]:
    found: dict[int, Category] = {}
    names: dict[str, int] = {}
    for position, entry in enumerate(entries):
        where = f"categories[{position}]"
        problem = _entry_problem(entry, ("id", "name"))
        if problem:
            problems.add(f"{where}: {problem}")
            continue
        number, name = _integer(entry["id"]), entry["name"]
        if number is None or not isinstance(name, str) or not name or not _is_text(name):
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


def _images(entries: list[Any], problems: _Problems) -> list[RawImage]:
    found: dict[int, RawImage] = {}
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
        found[number] = RawImage(
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
    return _file_name_problem(entry["file_name"])


def _file_name_problem(name: object) -> str | None:
    """Why ``name`` may not be joined to the image folder, or None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name is {name!r:.60}; expected a path below the image folder"
    if not _is_text(name):
        return f"file_name is {name!a:.60}, with half a character that no file name holds"
    parts = name.replace("\\", "/").split("/")
    # Any ".." is refused, also one that lexically stays inside: links could lead it out.
    if ".." in parts or not parts[0] or parts[0].endswith(":"):
        return (
            f"file_name {name!r} leaves the image folder; expected a relative path without '..': "
            "change it, or point 'images' at the folder that holds the files"
        )
    return None


class _Row(NamedTuple):
    """One annotation: (id, image index, label), its box, and what evaluation asks about it."""

    integers: tuple[int, int, int]
    box: tuple[float, ...]
    area: float | None
    crowd: bool
    foreign_flag: bool


def _annotations(
    entries: list[Any],
    image_index: dict[int, int],
    labels: dict[int, int],
    problems: _Problems,
) -> list[_Row]:
    rows: list[_Row] = []
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
            _Row(
                integers=(identity, index, label),
                box=tuple(entry["bbox"]),
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
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox is {box!r:.60}; expected [x, y, width, height] in pixels"
    if not isinstance(entry.get("area"), int | float | None):
        return f"area is {entry['area']!r:.40}; expected square pixels"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {entry['iscrowd']!r:.40}; expected 0 or 1"
    return None


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Far beyond any image, and still exact in float64.
    return abs(value) < 1e12 and math.isfinite(value)


def _any_float(value: float) -> float:
    """``value``, also where it is an integer that no float holds."""
    return float(value) if not abs(value) > 1e300 else math.inf


def _is_set(flag: object) -> bool:
    return flag in (1, "1", "true", "True", "yes")


def _is_text(name: str) -> bool:
    """Whether a text of JSON's is one: escapes may leave halves of surrogate pairs."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
