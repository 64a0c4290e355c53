"""Folders of images, wherever they are: which files are there, how big, and where to read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.progress import OnProgress, no_progress
from d3etr.storage.fetch import fetch_folder
from d3etr.storage.remote import RemoteFiles

BESIDE = "unlabelled:/"
"""Beginning of names in a folder's ``beside``; annotations have no such names."""


@dataclass(frozen=True)
class ImageFolder:
    """The images that an annotation file names; as text, where they are.

    Attributes:
        location: of the folder.
        copies: of a URL's images: name -> file on this machine; none where they were not fetched.
        looked_up: of a URL's images that were not fetched: name -> bytes.
        beside: another folder, whose images have names that begin with ``BESIDE``.
    """

    location: Url | Path
    copies: Mapping[str, Path] = field(default_factory=dict)
    looked_up: Mapping[str, int] = field(default_factory=dict)
    beside: ImageFolder | None = None

    @property
    def is_readable(self) -> bool:
        """Whether the images' content is on this machine."""
        return isinstance(self.location, Path) or not self.looked_up

    def size(self, name: str) -> int | None:
        """Bytes of an image; None if there is none of that name."""
        if self.beside is not None and name.startswith(BESIDE):
            return self.beside.size(name.removeprefix(BESIDE))
        if isinstance(self.location, Url) and name not in self.copies:
            return self.looked_up.get(name)
        try:
            status = self.path(name).stat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def path(self, name: str) -> Path:
        """A file on this machine to read it from, or what a person would look for."""
        if self.beside is not None and name.startswith(BESIDE):
            return self.beside.path(name.removeprefix(BESIDE))
        if isinstance(self.location, Path):
            return self.location / name
        return self.copies.get(name) or Path(self.shown(name))

    def shown(self, name: str) -> str:
        """What error texts call an image: its path or URL."""
        if self.beside is not None and name.startswith(BESIDE):
            return self.beside.shown(name.removeprefix(BESIDE))
        return f"{str(self).rstrip('/')}/{name}"

    def __str__(self) -> str:
        return self.location.shown if isinstance(self.location, Url) else str(self.location)


def open_folder(
    location: Url | Path,
    names: Sequence[str],
    on_progress: OnProgress | None = None,
    *,
    fetch: bool = True,
    follow_links: bool = False,
) -> ImageFolder:
    """The folder of images at a location.

    Args:
        location: a path is taken as it is.
        names: the images that are needed, relative to it.
        on_progress: takes the state of the transfer.
        fetch: False only looks up which images there are.
        follow_links: whether links may lead out of a folder on this machine.

    Raises:
        UserError: a URL's storage does not answer, or refuses; links lead out of the folder.
    """
    if isinstance(location, Path):
        if not follow_links:
            _ensure_inside(location, names)
        return ImageFolder(location)
    if fetch:
        return ImageFolder(location, copies=fetch_folder(location, names, on_progress))
    found = RemoteFiles(location).versions(list(dict.fromkeys(names)), on_progress or no_progress)
    return ImageFolder(location, looked_up={name: v.size or 0 for name, v in found.items()})


def _ensure_inside(folder: Path, names: Sequence[str]) -> None:
    """Refuse names that links make files of other places; the folder itself may be a link."""
    root = os.path.realpath(folder)
    above = {os.path.dirname(name) for name in names}
    places = {path: os.path.realpath(os.path.join(root, path)) for path in above}
    leaving: list[tuple[str, str]] = []
    for name in names:
        place = os.path.join(places[os.path.dirname(name)], os.path.basename(name))
        place = os.path.realpath(place) if os.path.islink(place) else place
        if not place.startswith(os.path.join(root, "")):
            leaving.append((name, place))
    if leaving:
        name, place = leaving[0]
        raise UserError(
            f"{folder}: links lead out of this folder for {len(leaving)} images, for example "
            f"{name!r} to {place!r}. Copy the files, or allow it: follow_links next to the split's "
            "images and annotations (d3etr evaluate and init: --follow-links)"
        )
