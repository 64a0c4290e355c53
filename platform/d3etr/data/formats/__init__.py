"""Data formats: a file each that reads annotations into records; found here, by name.

A package of one's own adds a format through the entry point group ``d3etr.formats``: its value
is a class with ``title``, ``places`` and ``read``, see ``DataFormat``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from d3etr.config.location import Location, Url
from d3etr.data.annotations import DataFormat
from d3etr.errors import UserError

FORMATS = {
    "coco": "d3etr.data.formats.coco:CocoFormat",
    "yolo": "d3etr.data.formats.yolo:YoloFormat",
    "voc": "d3etr.data.formats.voc:VocFormat",
    "imagefolder": "d3etr.data.formats.imagefolder:ImageFolderFormat",
}
"""Name -> class; its module is imported when it is asked for."""
ENTRY_POINTS = "d3etr.formats"
AUTO = "auto"
REMOTE = ("coco",)
"""Formats whose annotations may be a URL."""


def find_format(name: str, place: Location) -> tuple[str, DataFormat]:
    """The format of the annotations at ``place``.

    Args:
        name: of the format; ``auto`` takes the one among ours that recognises the place.
        place: a file or folder, or its URL.

    Returns:
        The format's name, and the format.

    Raises:
        UserError: there is no such format, none recognises the place, or it cannot be a URL.
    """
    name = _recognise(place) if name == AUTO else name
    found = _format(name)
    if isinstance(place, Url) and name not in REMOTE:
        raise UserError(
            f"{place.shown}: a {found.title} is read from folders of this machine only; copy the "
            "data set here, or write its annotations as a COCO file"
        )
    return name, found


def _recognise(place: Location) -> str:
    """The first of our formats that a path looks like."""
    if isinstance(place, Url):
        # What is there would have to be fetched to be looked at.
        folders = place.path.suffix.lower() in (".yaml", ".yml", ".jsonl", ".xml")
        if folders or place.text.endswith("/"):
            raise UserError(
                f"{place.shown}: expected the URL of a COCO detection JSON; data sets in other "
                "formats are read from folders of this machine: copy this one here"
            )
        return "coco"
    for name in FORMATS:
        if cast(Any, _format(name)).recognises(place):
            return name
    if place.is_dir():
        raise UserError(
            f"{place} is a folder in no format that is known: found neither data.yaml (YOLO), nor "
            "Annotations or *.xml (Pascal VOC), nor metadata.jsonl (image folder) in it. Name the "
            f"file or folder that holds the annotations, or set 'format' ({', '.join(FORMATS)})"
        )
    return "coco"


def _format(name: str) -> DataFormat:
    theirs: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        theirs.setdefault(point.name, {})[point.value] = point
    points = [*theirs.get(name, {}).values()]
    if name in FORMATS and points:
        raise UserError(
            f"{_package(points[0])} brings a data format called '{name}', which is d3etr's own: "
            f"uninstall it until it takes another name in its entry points '{ENTRY_POINTS}'"
        )
    if name in FORMATS:
        module, _, kind = FORMATS[name].partition(":")
        return cast(DataFormat, getattr(import_module(module), kind)())
    if not points:
        raise UserError(
            f"there is no data format '{name}': expected {AUTO}, "
            f"{', '.join([*FORMATS, *sorted(theirs)])}; packages add others through entry points "
            f"'{ENTRY_POINTS}'"
        )
    if len(points) > 1:
        packages = " and ".join(map(_package, points))
        raise UserError(f"{packages} both bring a data format called '{name}': uninstall one")
    return _load(points[0])


def _load(point: EntryPoint) -> DataFormat:
    try:
        return cast(DataFormat, point.load()())
    except Exception as error:  # whatever a stranger's module raises
        raise UserError(
            f"the data format '{point.name}' cannot be imported from "
            f"{_package(point)}: {type(error).__name__}: {error}"
        ) from error


def _package(point: EntryPoint) -> str:
    name = getattr(point.dist, "name", None)
    return f"{point.value} of package {name}" if name else point.value
