"""Hugging Face's image folder: metadata.jsonl with a line per image, its objects' boxes in it.

A line is ``{"file_name": "a.png", "objects": {"bbox": [[x, y, width, height]], "categories":
["cat"]}}``, boxes in pixels. Splits are folders below the one that is named, or files of their
own. Classes are all names in all splits, by spelling, unless a ``classes.txt`` in the folder gives
them and their order; then numbers are lines of that file, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from d3etr.data.annotations import (
    Annotations,
    Problems,
    Source,
    box_problem,
    file_name_problem,
    is_text,
)
from d3etr.data.formats.files import (
    CLASSES_FILE,
    FoundImage,
    FoundObject,
    assemble,
    class_names,
    lines_of,
    read_bytes,
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

    def subsets(self, place: Path) -> tuple[str, ...]:
        """The folders below ``place`` that are a split each; none where it is one itself."""
        return tuple(sorted(file.parent.name for file in place.glob(f"*/{_FILE}")))

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
        known = class_names(root, ()) if (root / CLASSES_FILE).is_file() else None
        content = read_bytes(file)
        images = _images(file, content, known, problems)
        if not images:
            problems.add("has no usable line; expected an object with file_name in each")
        problems.raise_if_any()
        if known is None:
            # What is wrong in other splits is said when they are read.
            others = [other for other in _all_metadata(root) if other != file]
            everywhere = images + [
                image
                for other in others
                for image in _images(other, read_bytes(other), None, Problems(other, ""))
            ]
            known = class_names(root, (str(o.which) for i in everywhere for o in i.objects))
        return assemble(images, known, file.parent, problems, [("lines", content)])


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


def _images(
    file: Path, content: bytes, known: Sequence[str] | None, problems: Problems
) -> list[FoundImage]:
    """The usable lines, by file name."""
    found: dict[str, FoundImage] = {}
    for number, text in enumerate(lines_of(file, content), start=1):
        if not text.strip():
            continue
        place = f"{file}:{number}"
        try:
            image = _image(text, place, known)
        except UserError as error:
            problems.add(f"{place}: {error}")
            continue
        if image.name in found:
            problems.add(f"{place}: {image.name!r:.80} is also in {found[image.name].place}")
        found[image.name] = image
    return [found[name] for name in sorted(found)]


def _image(text: str, place: str, known: Sequence[str] | None) -> FoundImage:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({error}); expected one object a line") from error
    if not isinstance(entry, dict):
        raise UserError(f"found {entry!r:.60}; expected an object with file_name and objects")
    problem = file_name_problem(entry.get("file_name"))
    if problem is not None:
        raise UserError(problem)
    sides = [entry.get(side) for side in ("width", "height")]
    whole = [side for side in sides if type(side) is int and 0 < side < 2**31]
    size = (whole[0], whole[1]) if len(whole) == 2 else None
    return FoundImage(entry["file_name"], place, size, _objects(entry.get("objects"), place, known))


def _objects(objects: object, place: str, known: Sequence[str] | None) -> list[FoundObject]:
    """The objects of a line."""
    if objects is None:
        return []
    if not isinstance(objects, dict):
        raise UserError(
            f"objects is {objects!r:.60}; expected an object with the lists bbox and categories"
        )
    boxes = objects.get("bbox")
    classes = next((objects[key] for key in _CLASS_KEYS if key in objects), None)
    if not isinstance(boxes, list) or not isinstance(classes, list):
        raise UserError("objects lacks bbox or categories; expected a list each, of one length")
    more = [objects.get(name) or [None] * len(boxes) for name in ("area", "iscrowd")]
    if any(not isinstance(c, list) or len(c) != len(boxes) for c in (classes, *more)):
        raise UserError(f"objects has {len(boxes)} boxes and other lists of another length")
    found = []
    for box, which, area, crowd in zip(boxes, classes, *more, strict=True):
        name, problem = _name(which, known), box_problem(box, area)
        if name is None:
            expected = "a name" if known is None else f"a name or line of {CLASSES_FILE}"
            raise UserError(f"class {which!r:.40} is unknown; expected {expected}")
        if problem is not None:
            raise UserError(problem)
        if crowd not in (None, 0, 1):
            raise UserError(f"iscrowd is {crowd!r:.40}; expected 0 or 1")
        found.append(FoundObject(name, tuple(box), place, area, bool(crowd)))
    return found


def _name(which: object, known: Sequence[str] | None) -> str | None:
    if isinstance(which, str):
        usable = bool(which) and is_text(which) and (known is None or which in known)
        return which if usable else None
    if not isinstance(which, int) or isinstance(which, bool) or abs(which) > 2**31:
        return None
    if known is None:
        return str(which)
    return known[which] if 0 <= which < len(known) else None
