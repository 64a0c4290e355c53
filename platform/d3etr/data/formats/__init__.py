"""Data formats: a file each that reads annotations into records; found here, by name.

A package of one's own adds a format through the entry point group ``d3etr.formats``: its value
is a class with ``title`` and ``read``, see ``DataFormat``.
"""

from __future__ import annotations

from typing import Any, cast

from d3etr.config.location import Location, Url
from d3etr.data.annotations import DataFormat
from d3etr.errors import UserError
from d3etr.registry import FORMATS

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
    for name in FORMATS.built_in:
        if cast(Any, _format(name)).recognises(place):
            return name
    if place.is_dir():
        raise UserError(
            f"{place} is a folder in no format that is known: found neither data.yaml (YOLO), nor "
            "Annotations or *.xml (Pascal VOC), nor metadata.jsonl (image folder) in it. Name the "
            "file or folder that holds the annotations, or set 'format' "
            f"({', '.join(FORMATS.names)})"
        )
    return "coco"


def _format(name: str) -> DataFormat:
    found: DataFormat = FORMATS.find(name)()
    return found
