"""Pascal VOC: an XML file per image in Annotations, images in JPEGImages, lists in ImageSets/Main.

The folders ``annotations`` and ``images`` are taken for those of the same meaning.
Boxes are corners in pixels that count from 1 and include both ends. Objects marked difficult are
not learnt and ignored in evaluation. Classes are all names in all XML files, by spelling, unless a
``classes.txt`` in the folder gives them and their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from d3etr.data.annotations import Annotations, Problems, Source, file_name_problem
from d3etr.data.formats.files import (
    FoundImage,
    FoundObject,
    assemble,
    class_names,
    is_image,
    lines_of,
    read_bytes,
)
from d3etr.errors import UserError

_ANNOTATIONS, _IMAGES, _LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
_PICTURES = (_IMAGES, "images")
_FLAGS = ("-1", "0", "1")
_FARTHEST = 1e9
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocFormat:
    """A folder with Annotations, JPEGImages and ImageSets, or just one of XML files."""

    title = "Pascal VOC data set"

    def recognises(self, place: Path) -> bool:
        """Whether ``place`` is a folder of XML files, or has one called Annotations."""
        return place.is_dir() and (_annotations(place) is not None or _has_xml(place))

    def subsets(self, place: Path) -> tuple[str, ...]:
        """The lists in ``ImageSets/Main``, but for those of one class such as ``cat_train``.

        Raises:
            UserError: a list cannot be read.
        """
        lists = _Layout.of(Source(place)).root / _LISTS
        files = {file.stem: file for file in sorted(lists.glob("*.txt"))}
        return tuple(name for name in files if not _of_a_class(name, files))

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
        files = {file.stem: file for file in sorted(layout.annotations.glob("*.xml"))}
        contents: dict[str, bytes] = {}
        scenes: dict[str, FoundImage] = {}
        for stem, file in files.items():
            try:
                contents[stem] = read_bytes(file, of_one_image=True)
                scenes[stem] = _parse(file, contents[stem], problems)
            except UserError as error:
                problems.add(f"{file}: {error}")
        stems = layout.chosen(source, sorted(files))
        for stem in stems:
            if stem not in files:
                file = layout.annotations / f"{stem}.xml"
                problems.add(f"{file} is not there, but {source.subset}.txt lists it")
        names = class_names(layout.root, (str(o.which) for s in scenes.values() for o in s.objects))
        chosen = [stem for stem in stems if stem in scenes]
        _find_pictures(layout.images, {stem: scenes[stem] for stem in chosen})
        return assemble(
            [scenes[stem] for stem in chosen],
            names,
            layout.images,
            problems,
            ((f"{stem}.xml", contents[stem]) for stem in chosen),
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
        inside = _annotations(place)
        annotations = inside or place
        whole = annotations.name.lower() == _ANNOTATIONS.lower()
        root = annotations.parent if whole else place
        images = source.images if isinstance(source.images, Path) else None
        if source.images is None:
            images = _pictures(root, annotations)
        return cls(root, annotations, images)

    def chosen(self, source: Source, everything: list[str]) -> list[str]:
        """The images of the subset, without suffix, sorted.

        Raises:
            UserError: no list is called so.
        """
        lists = self.root / _LISTS
        there = sorted(path.stem for path in lists.glob("*.txt"))
        if not there and not source.chosen:
            return everything
        file = lists / f"{source.subset}.txt"
        if not file.is_file():
            raise UserError(
                f"{file} is not there: expected a list of images, one a line. Found "
                f"{', '.join(there[:12]) or 'no list'}; 'subset' chooses one by its name"
            )
        known = {*everything}
        return sorted({_stem(line.strip(), known) for line in lines_of(file) if line.strip()})


def _stem(line: str, known: Set[str]) -> str:
    """The image that a line of a list names, among the ``known`` ones or without its flag.

    A flag (-1, 0 or 1) tells whether the class that a list is named after is in the image.
    """
    parts = line.rsplit(maxsplit=1)
    return line if line in known or parts[-1] not in _FLAGS else parts[0]


def _of_a_class(name: str, files: Mapping[str, Path]) -> bool:
    """Whether a list has another's images, each with a flag."""
    which, _, whole = name.rpartition("_")
    if not which or whole not in files:
        return False
    first = next((line.split() for line in lines_of(files[name]) if line.strip()), [])
    return len(first) > 1 and first[-1] in _FLAGS


def _annotations(place: Path) -> Path | None:
    """The folder of XML files in a data set; data sets of other formats have one in lower case."""
    if (place / _ANNOTATIONS).is_dir():
        return place / _ANNOTATIONS
    lower = place / _ANNOTATIONS.lower()
    return lower if _has_xml(lower) else None


def _has_xml(folder: Path) -> bool:
    return next(folder.glob("*.xml"), None) is not None


def _pictures(root: Path, annotations: Path) -> Path:
    """The folder of images: one that is called so, or that of the XML files or the one above."""
    named, beside = (
        [above / name for name in _PICTURES if (above / name).is_dir()]
        for above in (root, annotations.parent)
    )
    mixed, above = (
        [folder] if any(is_image(path.name) for path in folder.iterdir()) else []
        for folder in (annotations, root)
    )
    usual = root if annotations == root else root / _IMAGES
    return [*named, *mixed, *beside, *above, usual][0]


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses declarations of entities before any of them is read."""

    def doctype(self, name: str, *_: object) -> None:
        """Called for ``<!DOCTYPE``."""
        raise UserError("has a DOCTYPE, which annotations do not need: take that line out")


def _parse(file: Path, content: bytes, problems: Problems) -> FoundImage:
    """One XML file; its image has the name that the file says, or none.

    Raises:
        UserError: it is broken.
    """
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(content)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"broken XML ({error}); write it again") from error
    image = FoundImage((root.findtext("filename") or "").strip(), place=str(file))
    if image.name:
        problem = file_name_problem(image.name)
        if problem is not None:
            problems.add(f"{file}: {problem}")
    sides = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    whole = [int(side) for side in sides if side >= 1 and side.is_integer()]
    if len(whole) == len(sides):  # some tools leave them out, or write 0
        image.size = (whole[0], whole[1])
    for number, element in enumerate(root.iter("object"), start=1):
        try:
            image.objects.append(_object(element, f"{file} object {number}"))
        except UserError as error:
            problems.add(f"{file} object {number}: {error}")
    return image


def _object(element: ElementTree.Element, place: str) -> FoundObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError("has no name; expected <name>")
    texts = [element.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    left, top, right, bottom = corners = [_number(text) for text in texts]
    if any(map(math.isnan, corners)):
        found = ", ".join(f"{c} {t!r:.20}" for c, t in zip(_CORNERS, texts, strict=True))
        raise UserError(f"bndbox has {found}; expected four numbers of pixels")
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"difficult is {difficult!r:.20}; expected 0 or 1")
    box = (left - 1, top - 1, right - left + 1, bottom - top + 1)
    return FoundObject(name, box, place, crowd=difficult == "1")


def _number(text: str | None) -> float:
    """NaN for what is no number that may stand in a box."""
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if abs(value) <= _FARTHEST else math.nan


def _find_pictures(folder: Path | None, images: dict[str, FoundImage]) -> None:
    """Where the name in an XML file is not there, the picture that is called like that file."""
    if folder is None or not folder.is_dir():
        there = dict[str, str]()
    else:
        # Of several that differ in their suffix the first by name, on every machine.
        files = sorted(folder.iterdir(), reverse=True)
        there = {path.stem: path.name for path in files if is_image(path.name)}
    for stem, image in images.items():
        if not image.name or (stem in there and folder and not (folder / image.name).is_file()):
            image.name = there.get(stem, f"{stem}.jpg")
