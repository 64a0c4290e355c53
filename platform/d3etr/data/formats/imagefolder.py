"""Hugging Face's image folder: metadata.jsonl with a line per image, its objects' boxes in it.

A line is ``{"file_name": "a.png", "objects": {"bbox": [[x, y, width, height]], "categories":
["cat"]}}``, boxes in pixels. Splits are folders below the one that is named, or files of their
own. Classes are all names in all splits, by spelling, unless a ``classes.txt`` in the folder gives
them and their order; then numbers are lines of that file, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from d3etr.data.annotations import (
    Annotations,
    ImageEntry,
    ObjectEntry,
    Problems,
    Source,
    file_name_problem,
    is_number,
    is_text,
)
from d3etr.data.formats.files import (
    CLASSES_FILE,
    Size,
    categories_of,
    class_names,
    digest_of,
    image_sizes,
    read_bytes,
    text_of,
)
from d3etr.errors import UserError

_FILE = "metadata.jsonl"
_FOLDERS = {"val": ("val", "validation", "valid", "dev")}
_CLASS_KEYS = ("categories", "category", "labels", "label")


class ImageFolderFormat:
    """Folders of images with a metadata.jsonl each."""

    title = "image folder"

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is a .jsonl file, or a folder that has one or whose parts have."""
        if place.is_dir():
            return (place / _FILE).is_file() or next(place.glob(f"*/{_FILE}"), None) is not None
        return place.suffix.lower() == ".jsonl"

    def places(self, source: Source) -> list[Path]:
        """The split's metadata and images, and what classes are taken from."""
        try:
            file = _metadata(source)
        except UserError:
            return [source.annotations]
        root = _root(file, source)
        classes = root / CLASSES_FILE
        found = [file.parent, *_all_metadata(root), *([classes] if classes.exists() else [])]
        return list(dict.fromkeys(found))

    def read(self, source: Source) -> Annotations:
        """Read the lines of the split's metadata.jsonl.

        Raises:
            UserError: files cannot be used; all problems, with line numbers.
        """
        if source.images is not None:
            raise UserError(
                f"{source.annotations} names images relative to itself, but 'images' is set too "
                f"({source.images}): take it out"
            )
        file = _metadata(source)
        root, problems = _root(file, source), Problems(file, self.title)
        classes = root / CLASSES_FILE
        known = class_names(root, ()) if classes.is_file() else None
        content = read_bytes(file)
        lines = _lines(file, content, known, problems)
        if not lines:
            problems.add("has no usable line; expected an object with file_name in each")
        problems.raise_if_any()
        names = known or class_names(root, _names_everywhere(root, file, lines))
        if not names:
            problems.add("no object has a class; expected objects with bbox and categories")
        images = _images(file, lines, problems)
        problems.raise_if_any()
        return Annotations(
            categories=categories_of(names),
            images=images,
            objects=_objects(lines, {name: index for index, name in enumerate(names)}),
            digest=digest_of([("names", "\n".join(names).encode()), ("lines", content)]),
            folder=file.parent,
        )


def _metadata(source: Source) -> Path:
    """The file of the split.

    Raises:
        UserError: it is not there.
    """
    place = source.annotations
    if not place.is_dir():
        return place
    folders = _FOLDERS.get(source.subset, (source.subset,))
    tried = [place / folder / _FILE for folder in folders]
    tried += [] if source.chosen else [place / _FILE]
    for file in tried:
        if file.is_file():
            return file
    raise UserError(
        f"{place}: has no {' or '.join(str(file.relative_to(place)) for file in tried)}; expected "
        "one line of JSON per image there"
    )


def _root(file: Path, source: Source) -> Path:
    """The folder of all splits, whose names have to agree."""
    folders = {"train", "test", *_FOLDERS["val"], source.subset}
    return file.parent.parent if file.parent.name in folders else file.parent


def _all_metadata(root: Path) -> list[Path]:
    return [file for file in (root / _FILE, *sorted(root.glob(f"*/{_FILE}"))) if file.is_file()]


@dataclass(frozen=True)
class _Box:
    name: str
    box: tuple[float, ...]
    area: float | None
    crowd: bool


@dataclass(frozen=True)
class _Line:
    """One image; ``size`` is None where the line lacks it."""

    place: str
    file_name: str
    size: Size | None
    objects: tuple[_Box, ...]


def _lines(
    file: Path, content: bytes, known: Sequence[str] | None, problems: Problems
) -> list[_Line]:
    """The usable lines, by file name."""
    found: dict[str, _Line] = {}
    for number, text in enumerate(text_of(content, file).splitlines(), start=1):
        if not text.strip():
            continue
        place = f"{file}:{number}"
        line = _line(text, place, known)
        if isinstance(line, str):
            problems.add(f"{place}: {line}")
        elif line.file_name in found:
            problems.add(
                f"{place}: {line.file_name!r:.80} is also in {found[line.file_name].place}"
            )
        else:
            found[line.file_name] = line
    return [found[name] for name in sorted(found)]


def _line(text: str, place: str, known: Sequence[str] | None) -> _Line | str:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"broken JSON ({error}); expected one object a line"
    if not isinstance(entry, dict):
        return f"found {entry!r:.60}; expected an object with file_name and objects"
    problem = file_name_problem(entry.get("file_name"))
    if problem is not None:
        return problem
    sides = [entry.get(side) for side in ("width", "height")]
    whole = [side for side in sides if type(side) is int and 0 < side < 2**31]
    size = (whole[0], whole[1]) if len(whole) == 2 else None
    boxes = _boxes(entry.get("objects"), known)
    if isinstance(boxes, str):
        return boxes
    return _Line(place, entry["file_name"], size, boxes)


def _boxes(objects: object, known: Sequence[str] | None) -> tuple[_Box, ...] | str:
    """The objects of a line, or what is wrong with them."""
    if objects is None:
        return ()
    if not isinstance(objects, dict):
        return f"objects is {objects!r:.60}; expected an object with the lists bbox and categories"
    key = next((key for key in _CLASS_KEYS if key in objects), None)
    columns = [objects.get("bbox"), None if key is None else objects[key]]
    if not all(isinstance(column, list) for column in columns):
        return "objects lacks bbox or categories; expected a list each, of one length"
    boxes, classes = (column for column in columns if isinstance(column, list))
    more = [objects.get(name) or [None] * len(boxes) for name in ("area", "iscrowd")]
    if any(not isinstance(c, list) or len(c) != len(boxes) for c in (classes, *more)):
        return f"objects has {len(boxes)} boxes and other lists of another length"
    found = []
    for box, which, area, crowd in zip(boxes, classes, *more, strict=True):
        name = _name(which, known)
        if name is None:
            expected = "a name" if known is None else f"a name or line of {CLASSES_FILE}"
            return f"class {which!r:.40} is unknown; expected {expected}"
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            return f"bbox is {box!r:.60}; expected [x, y, width, height] in pixels"
        if area is not None and not is_number(area):
            return f"area is {area!r:.40}; expected square pixels"
        found.append(_Box(name, tuple(box), area, bool(crowd)))
    return tuple(found)


def _name(which: object, known: Sequence[str] | None) -> str | None:
    if isinstance(which, str):
        usable = bool(which) and is_text(which) and (known is None or which in known)
        return which if usable else None
    if not isinstance(which, int) or isinstance(which, bool) or abs(which) > 2**31:
        return None
    if known is None:
        return str(which)
    return known[which] if 0 <= which < len(known) else None


def _names_everywhere(root: Path, file: Path, lines: Sequence[_Line]) -> Iterator[str]:
    """The names in all splits; what is wrong in others is said when they are read."""
    yield from (found.name for line in lines for found in line.objects)
    for other in _all_metadata(root):
        if other != file:
            content, ignored = read_bytes(other), Problems(other, "")
            for line in _lines(other, content, None, ignored):
                yield from (found.name for found in line.objects)


def _images(file: Path, lines: Sequence[_Line], problems: Problems) -> list[ImageEntry]:
    unsized = [line.file_name for line in lines if line.size is None]
    looked = image_sizes([file.parent / name for name in unsized], problems)
    sizes = dict(zip(unsized, looked, strict=True))
    return [
        ImageEntry(number, line.file_name, *(line.size or sizes[line.file_name]))
        for number, line in enumerate(lines, start=1)
    ]


def _objects(lines: Sequence[_Line], labels: dict[str, int]) -> list[ObjectEntry]:
    entries: list[ObjectEntry] = []
    for index, line in enumerate(lines):
        for each in line.objects:
            label, identity = labels[each.name], len(entries) + 1
            entries.append(
                ObjectEntry(
                    identity, index, label, each.box, each.area, each.crowd, place=line.place
                )
            )
    return entries
