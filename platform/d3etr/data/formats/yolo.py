"""YOLO folders as Ultralytics writes and reads them: data.yaml, images, a text file of labels each.

A label line is ``class cx cy w h``, fractions of the image, or ``class x1 y1 x2 y2 ...``, an
outline. The labels of ``.../images/a/b.jpg`` are in ``.../labels/a/b.txt``; without a folder
``images`` they are next to the image.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3etr.config.problems import ConfigError
from d3etr.config.yaml_text import parse_yaml, read_text
from d3etr.data.annotations import Annotations, Problems, Source, file_name_problem
from d3etr.data.formats.files import (
    FoundImage,
    FoundObject,
    Size,
    assemble,
    image_sizes,
    images_below,
    is_image,
    lines_of,
    read_bytes,
)
from d3etr.errors import UserError

_FILE = "data.yaml"
_SUBSETS = ("train", "val", "test")
_ALSO = {"val": "validation"}
_BOX_VALUES = 5
_SLACK = 1e-3
"""By which rounding may bring a coordinate out of [0, 1]."""
_NO_PICTURE = "lines of lists name no picture of a kind that is read and are left out"
_WITHOUT_LABELS = "images have no label file, so they count as images without objects"
Notes = defaultdict[str, list[str]]
"""What was done to make records of files -> files and lines."""


class YoloFormat:
    """Folders that a data.yaml describes."""

    title = "YOLO data set"

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is a YAML file, or a folder with a data.yaml."""
        return place.suffix.lower() in (".yaml", ".yml") or (place / _FILE).is_file()

    def subsets(self, place: Path) -> tuple[str, ...]:
        """The splits that data.yaml names; one that has the images of another is none of its own.

        Raises:
            UserError: data.yaml cannot be used.
        """
        file = _yaml_file(place)
        tree = _tree(file)
        root, found = _root(file, tree), dict[frozenset[str], str]()
        for key in ("train", "val", "validation", "test"):
            if tree.get(key) and not any(_ALSO.get(name) == key for name in found.values()):
                entries = _entries(file, root, key, tree[key])
                found.setdefault(frozenset(map(os.path.realpath, entries)), key)
        return (*found.values(),)

    def read(self, source: Source) -> Annotations:
        """Read the split that ``source.subset`` names in data.yaml.

        Raises:
            UserError: data.yaml or label files cannot be used; all problems, with line numbers.
        """
        file = _yaml_file(source.annotations)
        if source.images is not None:
            raise UserError(
                f"{file} says where its images are, but 'images' is set too ({source.images}): "
                "take it out"
            )
        layout = _Layout.of(file, source.subset)
        problems, notes = Problems(file, self.title), Notes(list)
        folder, names = _image_names(layout, problems, notes)
        if not names:
            problems.add(f"'{source.subset}' holds no images ({_listed(layout.entries)})")
            problems.raise_if_any()
        sizes = image_sizes([folder / name for name in names], problems)
        labels = _Labels(layout, problems, notes)
        images = [
            FoundImage(name, size=size, objects=labels.read(folder / name, size))
            for name, size in zip(names, sizes, strict=True)
        ]
        missing = notes[_WITHOUT_LABELS]
        if len(missing) == len(names):
            problems.add(
                f"none of the {len(names)} images has a label file; expected, for example, "
                f"{missing[0]} for {folder / names[0]}"
            )
        contents = zip(names, labels.contents, strict=True)
        texts = [f"{len(at)} {text} ({_listed(at)})" for text, at in notes.items() if at]
        return assemble(images, layout.names, folder, problems, contents, tuple(texts))


def _yaml_file(place: Path) -> Path:
    return place / _FILE if place.is_dir() else place


@dataclass(frozen=True)
class _Layout:
    """What a data.yaml says of one split.

    Attributes:
        file: data.yaml.
        root: what its paths are relative to.
        names: of the classes.
        entries: folders of images, and files that list them.
        keypoints: whether more follows a box than an outline's corners.
    """

    file: Path
    root: Path
    names: list[str]
    entries: list[Path]
    keypoints: bool

    @classmethod
    def of(cls, file: Path, subset: str) -> _Layout:
        """Read data.yaml.

        Raises:
            UserError: it cannot be used, or lacks the split.
        """
        tree = _tree(file)
        root = _root(file, tree)
        value = tree.get(subset, tree.get(_ALSO.get(subset, subset)))
        if not value:
            there = [key for key in _SUBSETS if tree.get(key)]
            raise UserError(
                f"{file}: has no '{subset}' (found {', '.join(there) or 'no split at all'}); "
                "expected a folder of images, a file that lists them, or several of these"
            )
        entries = _entries(file, root, subset, value)
        return cls(file, root, _names(file, tree), entries, "kpt_shape" in tree)


def _root(file: Path, tree: Mapping[str, Any]) -> Path:
    """The folder that paths of a data.yaml are relative to.

    Raises:
        UserError: there is none.
    """
    path = _text(file, "path", tree.get("path") or ".")
    # Exports begin at the file, Ultralytics at where it is called, which is often above the file.
    # The working directory itself would be another one in the next command.
    above = (file.parent, *file.absolute().parents[1:])
    root = next((folder / path for folder in above if (folder / path).is_dir()), None)
    if root is None:
        raise UserError(
            f"{file}: path {path!r:.200} is no folder (looked for {file.parent / path}, and from "
            "the folders above); expected the folder of the data set, relative to this file or to "
            "a folder above it, or no 'path' if that is this file's own"
        )
    return root


def _tree(file: Path) -> dict[str, Any]:
    """What a data.yaml holds.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        tree = parse_yaml(read_text(file), str(file))
    except ConfigError as error:
        raise UserError(str(error)) from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: found no mapping; expected YOLO's data.yaml with train, val and names"
        )
    return tree


def _text(file: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"{file}: '{key}' is {value!r:.60}; expected a path, or a list of paths")
    return value


def _entries(file: Path, root: Path, subset: str, value: object) -> list[Path]:
    """Folders of images, and files that list them, by what data.yaml says of a split."""
    parts = value if isinstance(value, list) else [value]
    return [_entry(file, root, subset, _text(file, subset, part)) for part in parts]


def _entry(file: Path, root: Path, subset: str, part: str) -> Path:
    # Roboflow writes one level too many.
    places = [root / part, root / part.removeprefix("../")]
    for place in places:
        if place.exists():
            return place.resolve() if ".." in place.parts else place
    raise UserError(
        f"{file}: '{subset}' names {part!r:.200}, which is not there (looked for {places[0]}); "
        "expected a folder of images or a file that lists them, relative to 'path'"
    )


def _names(file: Path, tree: Mapping[str, Any]) -> list[str]:
    found, count = tree.get("names"), tree.get("nc")
    if isinstance(found, Mapping):
        numbers = {str(key): value for key, value in found.items()}
        wanted = [str(index) for index in range(len(found))]
        if set(numbers) != set(wanted):
            raise UserError(
                f"{file}: names has the ids {', '.join(list(numbers)[:12])}; expected every id "
                f"from 0 to {len(found) - 1} once"
            )
        found = [numbers[index] for index in wanted]
    scalar = isinstance(found, list) and all(isinstance(n, str | int | float) for n in found)
    if not scalar or not found:
        raise UserError(
            f"{file}: names is {found!r:.60}; expected a list of class names, or ids: names"
        )
    names = [str(name) for name in found]
    again = [name for index, name in enumerate(names) if not name or name in names[:index]]
    if again:
        raise UserError(f"{file}: names has {again[0]!r} more than once, or empty; rename one")
    if count is not None and count != len(names):
        raise UserError(f"{file}: nc is {count!r:.20}, but names has {len(names)} classes")
    return names


def _image_names(layout: _Layout, problems: Problems, notes: Notes) -> tuple[Path, list[str]]:
    """The folder of all images, and their names relative to it, sorted."""
    files: list[Path] = []
    for entry in layout.entries:
        files += images_below(entry) if entry.is_dir() else _listed_images(entry, notes)
    places = [entry if entry.is_dir() else layout.root for entry in layout.entries]
    folder = Path(os.path.commonpath([os.path.abspath(place) for place in places]))
    if len(places) == 1:
        folder = places[0]
    names = set[str]()
    for file in files:
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        if file_name_problem(name):
            problems.add(
                f"{file} is outside of {folder}; expected images below the folder that 'path' says"
            )
        elif not file.is_file():
            problems.add(f"{file} is listed, but not there")
        else:
            names.add(name)
    return folder, sorted(names)


def _listed_images(file: Path, notes: Notes) -> Iterator[Path]:
    """The images that a text file lists, relative to its folder."""
    for number, line in enumerate(lines_of(file), start=1):
        text = line.strip()
        if text and "\0" not in text and is_image(os.path.basename(text)):
            yield Path(os.path.normpath(file.parent / text))
        elif text:
            notes[_NO_PICTURE].append(f"{file}:{number}")


def _label_file(image: Path) -> Path:
    """Where the labels of an image are."""
    above, separator, below = os.path.abspath(image).rpartition(f"{os.sep}images{os.sep}")
    place = f"{above}{os.sep}labels{os.sep}{below}" if separator else below
    return Path(os.path.splitext(place)[0] + ".txt")


class _Labels:
    """Reads the objects of a split, image after image.

    Args:
        layout: of the split.
        problems: takes lines that cannot be used.
        notes: takes what was done to make records of the others.

    Attributes:
        contents: of the label files.
    """

    def __init__(self, layout: _Layout, problems: Problems, notes: Notes) -> None:
        self._layout, self._problems, self._notes = layout, problems, notes
        self.contents: list[bytes] = []

    def read(self, image: Path, size: Size) -> list[FoundObject]:
        """The objects of an image; a missing or empty file means that it has none."""
        file = _label_file(image)
        if not file.exists():
            self._notes[_WITHOUT_LABELS].append(str(file))
            self.contents.append(b"")
            return []
        self.contents.append(read_bytes(file, of_one_image=True))
        found: dict[tuple[float, ...], FoundObject] = {}
        for number, line in enumerate(lines_of(file, self.contents[-1]), start=1):
            place, texts = f"{file}:{number}", line.split()
            if not texts:
                continue
            try:
                values = self._values(texts)
            except UserError as error:
                self._problems.add(f"{place}: {error}")
                continue
            if values in found:
                self._notes["lines repeat another of their file and are left out"].append(place)
                continue
            if len(texts) > _BOX_VALUES and not self._layout.keypoints:
                self._notes["lines are outlines: the boxes around them are taken"].append(place)
            found[values] = FoundObject(int(values[0]), _pixels(values[1:], size), place)
        return list(found.values())

    def _values(self, texts: Sequence[str]) -> tuple[float, ...]:
        """Class, centre and size as fractions of the image.

        Raises:
            UserError: what is wrong with the line.
        """
        try:
            values = [float(text) for text in texts]
        except ValueError:
            raise UserError(
                f"found {' '.join(texts)!r:.60}; expected numbers: class cx cy w h"
            ) from None
        label, classes = values[0], len(self._layout.names)
        if not label.is_integer() or not 0 <= label < classes:
            raise UserError(
                f"class {texts[0]:.20} is not among the {classes} names in {self._layout.file}; "
                f"expected a whole number from 0 to {classes - 1}"
            )
        if self._layout.keypoints:
            values = values[:_BOX_VALUES]
        corners = len(values) > _BOX_VALUES + 1 and len(values) % 2 == 1
        if len(values) != _BOX_VALUES and not corners:
            more = "; a sixth number is a confidence, take it out" if len(values) == 6 else ""
            raise UserError(
                f"found {len(values)} numbers; expected class cx cy w h, or class x1 y1 x2 y2 x3 "
                f"y3 ... of an outline{more}"
            )
        fractions = zip(texts[1:], values[1:], strict=False)
        odd = [text for text, value in fractions if not -_SLACK <= value <= 1 + _SLACK]
        if odd:
            raise UserError(
                f"found {odd[0]:.20}; expected fractions of the image from 0 to 1: divide pixels "
                "by its width and height"
            )
        return (label, *(_around(values[1:]) if corners else values[1:]))


def _around(corners: Sequence[float]) -> tuple[float, float, float, float]:
    """Centre and size of the box around an outline."""
    left, right = min(corners[::2]), max(corners[::2])
    top, bottom = min(corners[1::2]), max(corners[1::2])
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _pixels(box_cxcywh: Sequence[float], size: Size) -> tuple[float, ...]:
    """Corner, width and height in pixels."""
    x, y, width, height = box_cxcywh
    columns, rows = size
    return ((x - width / 2) * columns, (y - height / 2) * rows, width * columns, height * rows)


def _listed(places: Sequence[object], shown: int = 3) -> str:
    texts = ", ".join(map(str, places[:shown]))
    return texts + (", ..." if len(places) > shown else "")
