"""What every data format reads its files into: classes, images, and objects in them.

I images, A annotations, C classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from d3etr.config.location import Location
from d3etr.errors import UserError

_SHOWN_PROBLEMS = 8


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
class ImageEntry:
    """One image; width and height in pixels, upright as its boxes are.

    Attributes:
        id: at most 63 bits; unique in a split.
        file_name: relative to the folder of images, with ``/`` between folders.
        width: pixels.
        height: pixels.
    """

    id: int
    file_name: str
    width: int
    height: int


class ObjectEntry(NamedTuple):
    """One annotated object.

    Attributes:
        id: of the annotation; at most 63 bits.
        image: index into ``Annotations.images``.
        label: index into ``Annotations.categories``.
        box_xywh: corner, width and height in pixels, as annotated.
        area: of the outline, square pixels; None: width x height.
        crowd: not to be learnt, and ignored in evaluation.
        foreign_flag: marked to be ignored in a way that its format does not know.
        place: file and line, for texts; not needed where ids are the files' own.
    """

    id: int
    image: int
    label: int
    box_xywh: tuple[float, ...]
    area: float | None = None
    crowd: bool = False
    foreign_flag: bool = False
    place: str = ""


@dataclass(frozen=True, eq=False)
class Annotations:
    """All that a format has read of one split.

    Attributes:
        categories: C of them, by rising id; the index here is the label.
        images: I of them.
        objects: A of them.
        digest: sha256 of the content that was read, hex.
        folder: of the images, where the format determines it; None: the configured one.
        own_ids: whether image and annotation ids are the files' own; else they count from 1.
        warnings: what may be wrong, a sentence each.
    """

    categories: tuple[Category, ...]
    images: Sequence[ImageEntry]
    objects: Sequence[ObjectEntry]
    digest: str
    folder: Path | None = None
    own_ids: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where the annotations of one split are.

    Attributes:
        annotations: a file or folder on this machine.
        images: the configured folder of images, or its URL; None where there is none.
        subset: ``train``, ``val``, ``test``, or what the recipe calls this part of the data set.
        chosen: whether the recipe names the subset, so that it cannot be left out of account.
    """

    annotations: Path
    images: Location | None = None
    subset: str = "train"
    chosen: bool = False


class DataFormat(Protocol):
    """One way to write annotations down."""

    title: str
    """What people call it."""

    def read(self, source: Source) -> Annotations:
        """Read one split.

        Raises:
            UserError: naming every place where something cannot be used.
        """
        ...


class Problems:
    """Collects what is wrong with files, so that one error names it all.

    Args:
        place: what cannot be used.
        title: what it should be.
    """

    def __init__(self, place: Path | str, title: str) -> None:
        self._place, self._title = place, title
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """One more, with its place."""
        self._texts.append(text)

    @property
    def found(self) -> bool:
        """Whether there are any."""
        return bool(self._texts)

    def raise_if_any(self) -> None:
        """End the reading.

        Raises:
            UserError: something was added.
        """
        if not self._texts:
            return
        shown = [f"  - {text}" for text in self._texts[:_SHOWN_PROBLEMS]]
        if len(self._texts) > _SHOWN_PROBLEMS:
            shown.append(f"  - and {len(self._texts) - _SHOWN_PROBLEMS} more")
        raise UserError("\n".join([f"{self._place}: not a usable {self._title}", *shown]))


def file_name_problem(name: object) -> str | None:
    """Why ``name`` may not be joined to the image folder, or None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name is {name!r:.60}; expected a path below the image folder"
    if not is_text(name):
        return f"file_name is {name!a:.60}, with half a character that no file name holds"
    parts = name.replace("\\", "/").split("/")
    # Any ".." is refused, also one that lexically stays inside: links could lead it out.
    if ".." in parts or not parts[0] or parts[0].endswith(":"):
        return (
            f"file_name {name!r} leaves the image folder; expected a relative path without '..': "
            "change it, or point 'images' at the folder that holds the files"
        )
    return None


def is_text(name: str) -> bool:
    """Whether a text of JSON's is one: escapes may leave halves of surrogate pairs."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def box_problem(box: object, area: object) -> str | None:
    """Why a file's box or its area cannot be used, or None."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox is {box!r:.60}; expected [x, y, width, height] in pixels"
    if not isinstance(area, int | float | None):
        return f"area is {area!r:.40}; expected square pixels"
    return None


def _is_number(value: object) -> bool:
    """Whether ``value`` is a number that may stand in a box."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Far beyond any image, and still exact in float64.
    return abs(value) < 1e12 and math.isfinite(value)
