"""Folders of images, wherever they are: which files are there, how big, and where to read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.progress import OnProgress
from d3etr.storage.cache import CachedFile
from d3etr.storage.fetch import fetch_folder
from d3etr.storage.remote import RemoteFiles


class ImageFolder(Protocol):
    """The images that an annotation file names; as text, where they are."""

    def size(self, name: str) -> int | None:
        """Bytes of an image; None if there is none of that name."""
        ...

    def path(self, name: str) -> Path:
        """A file on this machine to read it from; it need not exist."""
        ...

    def shown(self, name: str) -> str:
        """What error texts call it."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine, or one that looks like it."""

    folder: Path

    def size(self, name: str) -> int | None:
        """Bytes of an image; None if there is none of that name."""
        try:
            status = self.path(name).stat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def path(self, name: str) -> Path:
        """Where the image is, or should be."""
        return self.folder / name

    def shown(self, name: str) -> str:
        """Its path."""
        return str(self.path(name))

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class RemoteFolder:
    """Images of a URL.

    Attributes:
        url: of the folder.
        sizes: name -> bytes, of those that are there.
        copies: name -> copy on this machine; none where they were only looked up.
    """

    url: Url
    sizes: Mapping[str, int]
    copies: Mapping[str, CachedFile] = field(default_factory=dict)

    def size(self, name: str) -> int | None:
        """Bytes of an image; None if there is none of that name."""
        return self.sizes.get(name)

    def path(self, name: str) -> Path:
        """The image's copy; where there is none, what a person would look for."""
        return self.copies[name].path if name in self.copies else Path(self.shown(name))

    def shown(self, name: str) -> str:
        """Its URL."""
        return f"{self.url.shown.rstrip('/')}/{name}"

    def __str__(self) -> str:
        return self.url.shown


def open_folder(
    location: Url | Path,
    names: Iterable[str],
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
        return LocalFolder(location)
    if fetch:
        copies = fetch_folder(location, names, on_progress)
        return RemoteFolder(location, {name: copy.size for name, copy in copies.items()}, copies)
    found = RemoteFiles(location).versions(names)
    return RemoteFolder(
        location, {name: version.size or 0 for name, version in found if version is not None}
    )


def _ensure_inside(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that links make files of other places; the folder itself may be a link."""
    root = os.path.realpath(folder)
    places: dict[str, str] = {}
    leaving: list[tuple[str, str]] = []
    for name in names:
        above, last = os.path.split(name)
        if above not in places:
            places[above] = os.path.realpath(os.path.join(root, above))
        place = os.path.join(places[above], last)
        place = os.path.realpath(place) if os.path.islink(place) else place
        if not place.startswith(os.path.join(root, "")):
            leaving.append((name, place))
    if leaving:
        name, place = leaving[0]
        raise UserError(
            f"{folder}: links lead out of this folder for {len(leaving)} images, for example "
            f"{name!r} to {place!r}. Copy the files, or allow it: follow_links next to the split's "
            "images and annotations (d3etr evaluate: --follow-links)"
        )
