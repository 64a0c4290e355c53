"""Pascal VOC: an XML file per image in Annotations, images in JPEGImages, lists in ImageSets/Main.

Boxes are corners in pixels that count from 1 and include both ends. Objects marked difficult are
not learnt and ignored in evaluation. Classes are all names in all XML files, by spelling, unless a
``classes.txt`` in the folder gives them and their order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from d3etr.data.annotations import (
    Annotations,
    ImageEntry,
    ObjectEntry,
    Problems,
    Source,
    file_name_problem,
)
from d3etr.data.formats.files import (
    CLASSES_FILE,
    IMAGE_SUFFIXES,
    Size,
    categories_of,
    class_names,
    digest_of,
    image_sizes,
    read_bytes,
    read_lines,
)
from d3etr.errors import UserError

_ANNOTATIONS, _IMAGES, _LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
_FARTHEST = 1e9
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocFormat:
    """A folder with Annotations, JPEGImages and ImageSets, or just one of XML files."""

    title = "Pascal VOC data set"

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is a folder of XML files, or has one called Annotations."""
        return place.is_dir() and (
            (place / _ANNOTATIONS).is_dir() or next(place.glob("*.xml"), None) is not None
        )

    def places(self, source: Source) -> list[Path]:
        """The XML files' folder, images and lists."""
        layout = _Layout.of(source)
        lists = layout.root / _LISTS
        found = [layout.annotations, *([lists] if lists.is_dir() else [])]
        classes = layout.root / CLASSES_FILE
        found += [classes] if classes.is_file() else []
        return list(dict.fromkeys([*found, *([layout.images] if layout.images else [])]))

    def read(self, source: Source) -> Annotations:
        """Read the images that ``ImageSets/Main`` lists for the subset; all if there are no lists.

        Raises:
            UserError: files cannot be used; all problems, with their file.
        """
        place = source.annotations
        if not place.is_dir():
            raise UserError(
                f"{place} is no folder; expected a Pascal VOC data set with {_ANNOTATIONS}, "
                f"{_IMAGES} and {_LISTS}, or a folder of XML files"
            )
        layout, problems = _Layout.of(source), Problems(place, self.title)
        parsed = {file.stem: _parse(file, problems) for file in layout.files()}
        stems = layout.chosen(source, sorted(parsed))
        lacking = [stem for stem in stems if stem not in parsed]
        for stem in lacking:
            file = layout.annotations / f"{stem}.xml"
            problems.add(f"{file} is not there, but {source.subset}.txt lists it")
        scenes = {stem: scene for stem, scene in parsed.items() if scene is not None}
        names = class_names(layout.root, (o.name for s in scenes.values() for o in s.objects))
        chosen = [scenes[stem] for stem in stems if stem in scenes]
        images = _images(layout, chosen, problems)
        if not names and not problems.found:
            problems.add("no object has a name; expected <object><name> in some XML file")
        problems.raise_if_any()
        return Annotations(
            categories=categories_of(names),
            images=images,
            objects=_objects(chosen, {name: label for label, name in enumerate(names)}),
            digest=digest_of(
                [("names", "\n".join(names).encode()), *((s.file.name, s.content) for s in chosen)]
            ),
            folder=layout.images,
            warnings=_warnings(chosen),
        )


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a data set are; ``images`` is None where a URL was configured."""

    root: Path
    annotations: Path
    images: Path | None

    @classmethod
    def of(cls, source: Source) -> _Layout:
        place = source.annotations
        whole = (place / _ANNOTATIONS).is_dir()
        root = place if whole else place.parent if place.name == _ANNOTATIONS else place
        images = source.images if isinstance(source.images, Path) else None
        if source.images is None:
            beside = root / _IMAGES
            images = beside if beside.is_dir() or whole else place
        return cls(root, place / _ANNOTATIONS if whole else place, images)

    def files(self) -> list[Path]:
        """Every XML file, by name."""
        return sorted(self.annotations.glob("*.xml"))

    def chosen(self, source: Source, everything: list[str]) -> list[str]:
        """The images of the subset, without suffix, sorted.

        Raises:
            UserError: no list is called so.
        """
        lists = self.root / _LISTS
        if not lists.is_dir() and not source.chosen:
            return everything
        file = lists / f"{source.subset}.txt"
        if not file.is_file():
            there = sorted(path.stem for path in lists.glob("*.txt"))
            raise UserError(
                f"{file} is not there: expected a list of images, one a line. Found "
                f"{', '.join(there[:12]) or 'no list'}; 'subset' chooses one by its name"
            )
        lines = [line.split() for line in read_lines(file)]
        # A second number tells whether the class that a list is named after is in the image.
        return sorted({words[0] for words in lines if words})


@dataclass(frozen=True)
class _Object:
    name: str
    corners: tuple[float, ...]
    difficult: bool
    place: str


@dataclass(frozen=True)
class _Scene:
    """One XML file: its picture's name and size (if it says them), and objects."""

    file: Path
    content: bytes
    file_name: str | None
    size: Size | None
    objects: list[_Object] = field(default_factory=list)


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses declarations of entities before any of them is read."""

    def doctype(self, name: str, *_: object) -> None:
        """Called for ``<!DOCTYPE``."""
        raise UserError("has a DOCTYPE, which annotations do not need: take that line out")


def _parse(file: Path, problems: Problems) -> _Scene | None:
    """One XML file; None if it cannot be used, which ``problems`` says."""
    try:
        content = read_bytes(file)
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(content)
        root = parser.close()
    except UserError as error:
        problems.add(f"{file}: {error}")
        return None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        problems.add(f"{file}: broken XML ({error}); write it again")
        return None
    name = root.findtext("filename")
    scene = _Scene(file, content, name.strip() if name else None, _size(root))
    for number, element in enumerate(root.iter("object"), start=1):
        place = f"{file} object {number}"
        found = _object(element, place)
        if isinstance(found, str):
            problems.add(f"{place}: {found}")
        else:
            scene.objects.append(found)
    return scene


def _size(root: ElementTree.Element) -> Size | None:
    """Width and height; None where tools left them out or wrote 0."""
    sides = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    if not all(side is not None and side >= 1 and side.is_integer() for side in sides):
        return None
    width, height = (int(side) for side in sides if side is not None)
    return width, height


def _object(element: ElementTree.Element, place: str) -> _Object | str:
    name = (element.findtext("name") or "").strip()
    if not name:
        return "has no name; expected <name>"
    texts = [element.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    corners = [_number(text) for text in texts]
    if any(corner is None for corner in corners):
        found = ", ".join(f"{c} {t!r:.20}" for c, t in zip(_CORNERS, texts, strict=True))
        return f"bndbox has {found}; expected four numbers of pixels"
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        return f"difficult is {difficult!r:.20}; expected 0 or 1"
    return _Object(name, tuple(c for c in corners if c is not None), difficult == "1", place)


def _number(text: str | None) -> float | None:
    try:
        value = math.nan if text is None else float(text)
    except ValueError:
        return None
    return value if abs(value) <= _FARTHEST else None


def _images(layout: _Layout, scenes: Sequence[_Scene], problems: Problems) -> list[ImageEntry]:
    names = [_file_name(layout, scene, problems) for scene in scenes]
    unsized = [index for index, scene in enumerate(scenes) if scene.size is None]
    sizes = {index: scene.size for index, scene in enumerate(scenes) if scene.size is not None}
    if layout.images is None:
        for index in unsized:
            problems.add(f"{scenes[index].file}: has no size; expected <size> of its image")
    else:
        files = [layout.images / names[index] for index in unsized]
        sizes |= dict(zip(unsized, image_sizes(files, problems), strict=True))
    return [
        ImageEntry(index + 1, name, *sizes.get(index, (1, 1))) for index, name in enumerate(names)
    ]


def _file_name(layout: _Layout, scene: _Scene, problems: Problems) -> str:
    """What the XML names if that is there, else the image that is called like the XML file."""
    stem, named = scene.file.stem, scene.file_name
    if named is not None:
        problem = file_name_problem(named)
        if problem is not None:
            problems.add(f"{scene.file}: {problem}")
            return named
        if layout.images is None or (layout.images / named).is_file():
            return named
    for name in _like(stem, named):
        if layout.images is not None and (layout.images / name).is_file():
            return name
    return named or f"{stem}.jpg"


def _like(stem: str, named: str | None) -> Iterator[str]:
    suffixes = [".jpg", *sorted(IMAGE_SUFFIXES)]
    if named:
        suffixes.insert(0, os.path.splitext(named)[1])
    for suffix in dict.fromkeys(suffixes):
        yield from (f"{stem}{suffix}", f"{stem}{suffix.upper()}")


def _objects(scenes: Sequence[_Scene], labels: dict[str, int]) -> list[ObjectEntry]:
    entries: list[ObjectEntry] = []
    for index, found in ((i, o) for i, scene in enumerate(scenes) for o in scene.objects):
        left, top, right, bottom = found.corners
        box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
        label, identity = labels[found.name], len(entries) + 1
        entries.append(
            ObjectEntry(identity, index, label, box, crowd=found.difficult, place=found.place)
        )
    return entries


def _warnings(scenes: Sequence[_Scene]) -> tuple[str, ...]:
    zero = [o.place for s in scenes for o in s.objects if min(o.corners[:2]) < 1]
    if not zero:
        return ()
    return (
        f"{len(zero)} boxes begin before pixel 1 ({', '.join(zero[:3])}): Pascal VOC counts pixels "
        "from 1, so all boxes may be one pixel too far to the upper left",
    )
