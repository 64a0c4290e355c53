"""YOLO folders as Ultralytics writes and reads them: data.yaml, images, a text file of labels each.

A label line is ``class cx cy w h``, fractions of the image, or ``class x1 y1 x2 y2 ...``, an
outline. The labels of ``.../images/a/b.jpg`` are in ``.../labels/a/b.txt``; without a folder
``images`` they are next to the image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d3etr.config.problems import ConfigError
from d3etr.config.yaml_text import parse_yaml, read_text
from d3etr.data.annotations import (
    Annotations,
    ImageEntry,
    ObjectEntry,
    Problems,
    Source,
    file_name_problem,
)
from d3etr.data.formats.files import (
    Size,
    categories_of,
    digest_of,
    image_sizes,
    images_below,
    is_image,
    read_bytes,
    read_lines,
    text_of,
)
from d3etr.errors import UserError

_FILE = "data.yaml"
_SUBSETS = ("train", "val", "test")
_ALSO = {"val": "validation"}
_BOX_VALUES = 5
_SLACK = 1e-3
"""By which rounding may bring a coordinate out of [0, 1]."""


class YoloFormat:
    """Folders that a data.yaml describes."""

    title = "YOLO data set"

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is a YAML file, or a folder with a data.yaml."""
        return place.suffix.lower() in (".yaml", ".yml") or (place / _FILE).is_file()

    def places(self, source: Source) -> list[Path]:
        """data.yaml, and the folders or lists of the split with the folders of its labels."""
        file = _yaml_file(source.annotations)
        try:
            layout = _Layout.of(file, source.subset)
        except UserError:
            return [file]
        found = [file]
        for entry in layout.entries:
            found += [entry, *([_label_folder(entry)] if entry.is_dir() else [layout.root])]
        return list(dict.fromkeys(found))

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
        problems = Problems(file, self.title)
        folder, names = _image_names(layout, problems)
        if not names:
            problems.add(f"'{source.subset}' holds no images ({_listed(layout.entries)})")
            problems.raise_if_any()
        files = [folder / name for name in names]
        sizes = image_sizes(files, problems)
        labels = _Labels(layout, problems)
        for index, (image, size) in enumerate(zip(files, sizes, strict=True)):
            labels.read(index, image, size)
        labels.require_some(files)
        problems.raise_if_any()
        contents = zip(names, labels.contents, strict=True)
        return Annotations(
            categories=categories_of(layout.names),
            images=[
                ImageEntry(number, name, *size)
                for number, (name, size) in enumerate(zip(names, sizes, strict=True), start=1)
            ],
            objects=labels.objects,
            digest=digest_of([("names", "\n".join(layout.names).encode()), *contents]),
            folder=folder,
            warnings=labels.warnings(),
        )


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
        try:
            tree = parse_yaml(read_text(file), str(file))
        except ConfigError as error:
            raise UserError(str(error)) from error
        if not isinstance(tree, dict):
            raise UserError(
                f"{file}: found no mapping; expected YOLO's data.yaml with train, val and names"
            )
        root = _root(file, tree.get("path"))
        value = tree.get(subset, tree.get(_ALSO.get(subset, subset)))
        if not value:
            there = [key for key in _SUBSETS if tree.get(key)]
            raise UserError(
                f"{file}: has no '{subset}' (found {', '.join(there) or 'no split at all'}); "
                "expected a folder of images, a file that lists them, or several of these"
            )
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) and part for part in parts):
            raise UserError(
                f"{file}: '{subset}' is {value!r:.60}; expected a path, or a list of paths"
            )
        entries = [_entry(file, root, subset, part) for part in parts]
        return cls(file, root, _names(file, tree), entries, "kpt_shape" in tree)


def _root(file: Path, path: object) -> Path:
    """The folder that the splits are relative to; ``path`` is relative to data.yaml."""
    if path is None or path == "":
        return file.parent
    if not isinstance(path, str) or "\0" in path:
        raise UserError(f"{file}: path is {path!r:.60}; expected a folder")
    tried = [file.parent / path, Path(path)]  # Ultralytics tries the working directory
    for place in tried:
        if place.is_dir():
            return place
    raise UserError(
        f"{file}: path {path!r:.200} is no folder (looked for {_listed(tried)}); expected the "
        "folder of the data set, relative to this file, or no 'path' if that is this file's own"
    )


def _entry(file: Path, root: Path, subset: str, part: str) -> Path:
    places = [root / part]
    if part.startswith("../"):  # Roboflow writes one level too many
        places.append(root / part[len("../") :])
    for place in places:
        if "\0" not in part and place.exists():
            return place.resolve() if ".." in place.parts else place
    raise UserError(
        f"{file}: '{subset}' names {part!r:.200}, which is not there (looked for "
        f"{_listed(places)}); expected a folder of images or a file that lists them, relative to "
        "'path'"
    )


def _names(file: Path, tree: Mapping[str, Any]) -> list[str]:
    found, count = tree.get("names"), tree.get("nc")
    if found is None and isinstance(count, int) and 0 < count < 10**5:
        return [f"class_{index}" for index in range(count)]
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


def _image_names(layout: _Layout, problems: Problems) -> tuple[Path, list[str]]:
    """The folder of all images, and their names relative to it, sorted."""
    files: list[Path] = []
    for entry in layout.entries:
        files += images_below(entry) if entry.is_dir() else _listed_images(entry)
    if len(layout.entries) == 1 and layout.entries[0].is_dir():
        folder = layout.entries[0]
    else:
        places = [e if e.is_dir() else layout.root for e in layout.entries]
        folder = Path(os.path.commonpath([os.path.abspath(place) for place in places]))
    names = set[str]()
    for file in files:
        name = os.path.relpath(file, folder).replace(os.sep, "/")
        problem = file_name_problem(name)
        if problem:
            problems.add(
                f"{file} is outside of {folder}; expected images below the folder that 'path' says"
            )
        elif not file.is_file():
            problems.add(f"{file} is listed, but not there")
        else:
            names.add(name)
    return folder, sorted(names)


def _listed_images(file: Path) -> Iterator[Path]:
    """The images that a text file lists, relative to its folder."""
    for line in read_lines(file):
        text = line.strip()
        if text and "\0" not in text and is_image(os.path.basename(text)):
            yield Path(os.path.normpath(file.parent / text))


def label_file(image: Path) -> Path:
    """Where the labels of an image are."""
    above, separator, below = os.path.abspath(image).rpartition(f"{os.sep}images{os.sep}")
    place = f"{above}{os.sep}labels{os.sep}{below}" if separator else below
    return Path(os.path.splitext(place)[0] + ".txt")


def _label_folder(images: Path) -> Path:
    return label_file(images / "any").parent


@dataclass
class _Labels:
    """Objects of all images of a split, file after file."""

    layout: _Layout
    problems: Problems
    objects: list[ObjectEntry] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    outlines: list[str] = field(default_factory=list)

    def read(self, index: int, image: Path, size: Size) -> None:
        """Add the objects of image ``index``; a missing or empty file means that it has none."""
        file = label_file(image)
        if not file.exists():
            self.missing.append(file)
            self.contents.append(b"")
            return
        content = read_bytes(file)
        self.contents.append(content)
        seen: set[tuple[float, ...]] = set()
        for number, line in enumerate(text_of(content, file).splitlines(), start=1):
            values = line.split()
            if not values:
                continue
            place = f"{file}:{number}"
            found = self._values(values)
            if isinstance(found, str):
                self.problems.add(f"{place}: {found}")
            elif found in seen:
                self.repeated.append(place)
            else:
                seen.add(found)
                if len(values) > _BOX_VALUES and not self.layout.keypoints:
                    self.outlines.append(place)
                label, box = int(found[0]), _pixels(found[1:], size)
                identity = len(self.objects) + 1
                self.objects.append(ObjectEntry(identity, index, label, box, place=place))

    def _values(self, texts: Sequence[str]) -> tuple[float, ...] | str:
        """Class, centre and size as fractions of the image; or what is wrong with the line."""
        try:
            values = [float(text) for text in texts]
        except ValueError:
            return f"found {' '.join(texts)!r:.60}; expected numbers: class cx cy w h"
        label, classes = values[0], len(self.layout.names)
        if not label.is_integer() or not 0 <= label < classes:
            return (
                f"class {texts[0]:.20} is not among the {classes} names in {self.layout.file}; "
                f"expected a whole number from 0 to {classes - 1}"
            )
        if self.layout.keypoints:
            values = values[:_BOX_VALUES]
        corners = len(values) > _BOX_VALUES + 1 and len(values) % 2 == 1
        if len(values) != _BOX_VALUES and not corners:
            more = "; a sixth number is a confidence, take it out" if len(values) == 6 else ""
            return (
                f"found {len(values)} numbers; expected class cx cy w h, or class x1 y1 x2 y2 x3 "
                f"y3 ... of an outline{more}"
            )
        fractions = zip(texts[1:], values[1:], strict=False)
        odd = [text for text, value in fractions if not -_SLACK <= value <= 1 + _SLACK]
        if odd:
            return (
                f"found {odd[0]:.20}; expected fractions of the image from 0 to 1: divide pixels "
                "by its width and height"
            )
        return (label, *(_around(values[1:]) if corners else values[1:]))

    def require_some(self, images: Sequence[Path]) -> None:
        """Where no image has labels, they are looked for in the wrong place."""
        if len(self.missing) == len(images):
            self.problems.add(
                f"none of the {len(images)} images has a label file; expected, for example, "
                f"{self.missing[0]} for {images[0]}"
            )

    def warnings(self) -> tuple[str, ...]:
        """What was done to make records of the files."""
        texts: tuple[tuple[str, Sequence[object]], ...] = (
            ("images have no label file, so they count as images without objects", self.missing),
            ("lines repeat another of their file and are left out", self.repeated),
            ("lines are outlines: the boxes around them are taken", self.outlines),
        )
        return tuple(f"{len(at)} {text} ({_listed(at)})" for text, at in texts if at)


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
