"""What formats of many files share: images below a folder, their sizes, classes, digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from d3etr.data.annotations import Annotations, Category, ImageEntry, ObjectEntry, Problems
from d3etr.data.images import IMAGE_SUFFIXES, decoding_problem, open_image, upright_size
from d3etr.errors import UserError

CLASSES_FILE = "classes.txt"
"""Fixes classes and their order where annotations carry names alone; one name a line."""
_MOST_BYTES = 20 * 2**20
"""Of an annotation file of one image."""
_THREADS = 8
Size = tuple[int, int]


class FoundObject(NamedTuple):
    """One object as a file has it.

    Attributes:
        which: its class: a name, or the index of one.
        box_xywh: corner, width and height in pixels.
        place: file and line.
        area: square pixels, where the file says it.
        crowd: not to be learnt, and ignored in evaluation.
    """

    which: str | int
    box_xywh: tuple[float, ...]
    place: str
    area: float | None = None
    crowd: bool = False


@dataclass
class FoundImage:
    """One image as files have it.

    Attributes:
        name: of its file, relative to the folder of images.
        place: file and line that name it.
        size: upright (width, height) in pixels; None: the file itself is looked at.
        objects: annotated in it.
    """

    name: str
    place: str = ""
    size: Size | None = None
    objects: list[FoundObject] = field(default_factory=list)


def assemble(
    images: Sequence[FoundImage],
    names: Sequence[str],
    folder: Path | None,
    problems: Problems,
    contents: Iterable[tuple[str, bytes]],
    warnings: tuple[str, ...] = (),
) -> Annotations:
    """Annotations of images in their order, numbered from 1.

    Args:
        images: what was found.
        names: the classes, in the order of their labels.
        folder: of the images; None where they are not on this machine.
        problems: takes images whose size cannot be had; all of them are raised here.
        contents: what was read, for the data's digest: names and bytes.
        warnings: what may be wrong, a sentence each.

    Raises:
        UserError: there are problems.
    """
    if not names and not problems.found:
        problems.add("no object has a class; expected one in some annotation")
    unsized = [image for image in images if image.size is None]
    if folder is None:
        for image in unsized:
            problems.add(f"{image.place}: has no size; expected width and height of its image")
    else:
        sizes = image_sizes([folder / image.name for image in unsized], problems)
        for image, size in zip(unsized, sizes, strict=True):
            image.size = size
    problems.raise_if_any()
    labels = {name: label for label, name in enumerate(names)}
    found = [(index, each) for index, image in enumerate(images) for each in image.objects]
    return Annotations(
        categories=tuple(Category(index, name) for index, name in enumerate(names)),
        images=[
            ImageEntry(number, image.name, *(image.size or (1, 1)))
            for number, image in enumerate(images, start=1)
        ],
        objects=[
            ObjectEntry(
                id=number,
                image=index,
                label=each.which if isinstance(each.which, int) else labels[each.which],
                box_xywh=each.box_xywh,
                area=each.area,
                crowd=each.crowd,
                place=each.place,
            )
            for number, (index, each) in enumerate(found, start=1)
        ],
        digest=digest_of([("names", "\n".join(names).encode()), *contents]),
        folder=folder,
        warnings=warnings,
    )


def is_image(name: str) -> bool:
    """Whether a file is named like an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def images_below(folder: Path) -> Iterator[Path]:
    """Every image in a folder and those below it; links are followed, no folder comes twice."""
    seen: set[str] = set()
    for above, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(above)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        yield from (Path(above, name) for name in names if is_image(name))


def image_sizes(files: Sequence[Path], problems: Problems) -> list[Size]:
    """Upright (width, height) in pixels of every image, from their headers.

    Args:
        files: images.
        problems: takes those that cannot be read; their size is (1, 1).
    """

    def look(file: Path) -> Size | str:
        try:
            with open_image(file) as image:
                size = upright_size(image)
        except Exception as error:  # damaged bytes lead decoders to errors of any type
            return decoding_problem(error)
        return size if min(size) > 0 else f"the image has no pixels ({size[0]} x {size[1]})"

    sizes: list[Size] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, found in zip(files, pool.map(look, files), strict=True):
            if isinstance(found, str):
                problems.add(f"{file}: {found}")
                found = (1, 1)
            sizes.append(found)
    return sizes


def read_bytes(file: Path, *, of_one_image: bool = False) -> bytes:
    """The content of an annotation file.

    Args:
        file: the file.
        of_one_image: then it is small; one of all images may have any size.

    Raises:
        UserError: it cannot be read, or is far too large for one image.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1 if of_one_image else -1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{str(file)!r} cannot be read ({error})") from error
    if of_one_image and len(content) > _MOST_BYTES:
        raise UserError(
            f"{file} has more than {_MOST_BYTES / 2**20:.0f} MiB: it is no annotation file of this "
            "format"
        )
    return content


def lines_of(file: Path, content: bytes | None = None) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark, without their ends.

    Args:
        file: the file.
        content: its bytes, where they were read already.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        text = (read_bytes(file) if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    # str.splitlines would also end lines at separators that JSON texts and names may hold.
    return re.split("\r\n|\r|\n", text)


def class_names(folder: Path, found: Iterable[str]) -> list[str]:
    """The classes of a data set whose annotations carry names alone.

    Args:
        folder: of the data set; where it has a ``classes.txt``, that gives them and their order.
        found: the names in all annotations, in any order.

    Returns:
        Those of the file, or those that were found, by their spelling.

    Raises:
        UserError: the file repeats a name, or lacks one that annotations have.
    """
    file, used = folder / CLASSES_FILE, set(found)
    if not file.is_file():
        # Numbers as names: 2 before 10.
        numbers = all(name.isdecimal() for name in used)
        return sorted(used, key=lambda name: (len(name), name) if numbers else (0, name))
    names = [line.strip() for line in lines_of(file) if line.strip()]
    again = [name for index, name in enumerate(names) if name in names[:index]]
    if again:
        raise UserError(f"{file}: {again[0]!r} is there twice; expected one class a line")
    lacking = sorted(used - set(names))
    if lacking:
        raise UserError(
            f"{file}: lacks {', '.join(map(repr, lacking[:5]))}, which annotations name: add a "
            "line, or correct the annotations"
        )
    return names


def digest_of(parts: Iterable[tuple[str, bytes]]) -> str:
    """sha256, hex, over names and contents of files, in their order."""
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()
