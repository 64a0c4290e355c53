"""COCO detection files, checked entry by entry."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from d3etr.data.annotations import (
    Annotations,
    Category,
    ImageEntry,
    ObjectEntry,
    Problems,
    Source,
    box_problem,
    file_name_problem,
    is_text,
)
from d3etr.errors import UserError

_KEYS = ("images", "annotations", "categories")
_FOREIGN_FLAGS = ("ignore", "ignored", "difficult", "is_crowd", "isCrowd")
"""What other formats set an object aside by; in COCO files it has no effect."""


def read_images(path: Path) -> tuple[list[ImageEntry], str]:
    """The images that a file lists, whatever else it has, and the file's digest.

    Raises:
        UserError: the file is missing, is not JSON, or has images that cannot be used.
    """
    content, digest = _load(path, ("images",))
    problems, reader = Problems(path, "COCO file with a list of images"), _Reader()
    _read_entries("images", content["images"], reader, problems)
    problems.raise_if_any()
    return [*reader.images.values()], digest


class CocoFormat:
    """A COCO detection JSON: one file for all images of a split."""

    title = "COCO detection file"

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
        problems, reader = Problems(path, self.title), _Reader()
        for key in ("categories", "images", "annotations"):
            _read_entries(key, content[key], reader, problems)
        problems.raise_if_any()
        categories = tuple(reader.categories[number] for number in sorted(reader.categories))
        images = [*reader.images.values()]
        return Annotations(categories, images, reader.objects, digest, own_ids=True)


def _read_entries(key: str, entries: list[Any], reader: _Reader, problems: Problems) -> None:
    """One list of a file; what cannot be used is added to ``problems``."""
    needed, read = {
        "categories": (("id", "name"), reader.category),
        "images": (("id", "file_name", "width", "height"), reader.image),
        "annotations": (("image_id", "category_id", "bbox"), reader.annotation),
    }[key]
    for position, entry in enumerate(entries):
        try:
            _require_keys(entry, needed)
            read(entry, position)
        except UserError as error:
            number = _integer(entry.get("id")) if isinstance(entry, dict) else None
            shown = "" if number is None else f" (id {number})"
            problems.add(f"{key}[{position}]{shown}: {error}")
    if not entries and key != "annotations":
        problems.add(f"'{key}' is empty: expected at least one entry")
    reader.number_labels()


def _load(path: Path, keys: tuple[str, ...] = _KEYS) -> tuple[dict[str, list[Any]], str]:
    """The lists of a file, and its digest."""
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
    expected = f"a COCO detection file is an object with the lists {', '.join(keys)}"
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__} at the top; {expected}")
    missing = [key for key in keys if key not in content]
    if missing:
        found = ", ".join(map(repr, list(content)[:12])) or "nothing"
        raise UserError(f"{path}: missing key {', '.join(missing)} (found {found}); {expected}")
    for key in keys:
        if not isinstance(content[key], list):
            kind = type(content[key]).__name__
            raise UserError(f"{path}: '{key}' is a {kind}; {expected}")
    return content, hashlib.sha256(raw).hexdigest()


def _integer(value: object) -> int | None:
    """``value`` as int of at most 63 bits, or None; 640.0 counts, True and "640" do not."""
    if isinstance(value, bool):
        return None
    # A larger float has lost digits: it may be another id than the one that was written.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        value = int(value)
    # Arrays hold ids as int64.
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _require_keys(entry: object, keys: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"expected an object, found {entry!r:.60}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise UserError(f"missing key {', '.join(missing)}")


def _identity(entry: dict[str, Any]) -> int:
    number = _integer(entry["id"])
    if number is None:
        raise UserError(
            f"id is {entry['id']!r:.40}; expected an integer id (63 bits at most, and not as a "
            "float above 2**53, which has lost digits)"
        )
    return number


class _Reader:
    """Takes entry after entry; each method raises a ``UserError`` that says what is wrong.

    Attributes:
        categories: by id.
        images: by id.
        objects: in the file's order.
    """

    def __init__(self) -> None:
        self.categories: dict[int, Category] = {}
        self.images: dict[int, ImageEntry] = {}
        self.objects: list[ObjectEntry] = []
        self._names: dict[str, int] = {}
        self._image_index: dict[int, int] = {}
        self._labels: dict[int, int] = {}

    def number_labels(self) -> None:
        """Number what has been read: annotations come after categories and images."""
        self._image_index = {number: index for index, number in enumerate(self.images)}
        self._labels = {number: label for label, number in enumerate(sorted(self.categories))}

    def category(self, entry: dict[str, Any], _position: int) -> None:
        """One class."""
        number, name = _identity(entry), entry["name"]
        if not isinstance(name, str) or not name or not is_text(name):
            raise UserError(f"name is {name!a:.60}; expected a name")
        if number in self.categories:
            raise UserError(f"category id {number} is used twice; ids must be unique")
        other = self._names.setdefault(name, number)
        if other != number:
            raise UserError(f"name {name!r} is also category {other}'s; rename one")
        self.categories[number] = Category(number, name)

    def image(self, entry: dict[str, Any], _position: int) -> None:
        """One image."""
        number, name = _identity(entry), entry["file_name"]
        if number in self.images:
            raise UserError(
                f"image id {number} is used twice ({self.images[number].file_name!r} and "
                f"{name!r}); ids must be unique"
            )
        sides = [_integer(entry[key]) or 0 for key in ("width", "height")]
        for key, side in zip(("width", "height"), sides, strict=True):
            if side < 1:
                raise UserError(f"{key} is {entry[key]!r:.40}; expected whole pixels above 0")
        problem = file_name_problem(name)
        if problem is not None:
            raise UserError(problem)
        self.images[number] = ImageEntry(number, name, sides[0], sides[1])

    def annotation(self, entry: dict[str, Any], position: int) -> None:
        """One object."""
        image, category = _integer(entry["image_id"]), _integer(entry["category_id"])
        if image not in self._image_index:
            raise UserError(f"image_id {entry['image_id']!r:.40} is not among 'images'")
        if category not in self._labels:
            known = ", ".join(map(str, [*self._labels][:12]))
            raise UserError(
                f"category_id {entry['category_id']!r:.40} is not among 'categories' "
                f"(known ids: {known}{', ...' if len(self._labels) > 12 else ''}; image id {image})"
            )
        area, crowd = entry.get("area"), entry.get("iscrowd")
        problem = box_problem(entry["bbox"], area)
        if problem is not None:
            raise UserError(problem)
        if crowd not in (None, 0, 1):
            raise UserError(f"iscrowd is {crowd!r:.40}; expected 0 or 1")
        number = _integer(entry.get("id"))
        flags = [entry[key] for key in _FOREIGN_FLAGS if key in entry]
        self.objects.append(
            ObjectEntry(
                position if number is None else number,
                self._image_index[image],
                self._labels[category],
                tuple(entry["bbox"]),
                area=area,
                crowd=bool(crowd),
                foreign_flag=not crowd and any(f in (1, "1", "true", "True", "yes") for f in flags),
            )
        )
