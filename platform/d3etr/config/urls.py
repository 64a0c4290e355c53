"""Paths on this machine, and URLs of files or folders elsewhere; pydantic is not needed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from d3etr.config.credentials import refuse_credentials
from d3etr.errors import UserError
from d3etr.text import bare_url

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# One letter and a colon is a Windows drive.
_TORN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")


@dataclass(frozen=True)
class Url:
    """Something that fsspec reads, such as ``s3://bucket/photos`` or ``https://host/a.json``."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.text.partition("://")[0].lower()

    @property
    def path(self) -> PurePosixPath:
        """Host or bucket and what follows, without query: for names, not for reading."""
        parts = urlsplit(self.text)
        return PurePosixPath(unquote(f"{parts.netloc.rpartition('@')[2]}{parts.path}"))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def shown(self) -> str:
        """The URL without credentials, query and fragment."""
        return bare_url(self.text)


def parse_location(text: str) -> Url | Path:
    """A URL where ``text`` is one, else a path.

    Raises:
        ValueError: a URL with credentials, a chain of them, one that lost a slash, or a file URL
            without an absolute path.
    """
    refuse_credentials(text)
    if "://" in text and "::" in text:
        raise ValueError(
            f"found '{text}', a chain of URLs, which is not read: give the URL of the file or "
            "folder itself, or unpack it"
        )
    if not _URL.match(text):
        if "://" in text:
            raise ValueError(
                f"found '{text}', expected a path, or a URL that begins with s3://, "
                "https:// or the like"
            )
        if _TORN_URL.match(text):
            protocol, _, rest = text.partition(":/")
            raise ValueError(f"found '{text}'; did you mean '{protocol}://{rest}'?")
        return home_expanded(text)
    url = Url(text)
    if url.protocol in ("http", "https") and "#" in text:
        raise ValueError(
            f"found '{url.shown}#...', but what follows '#' is never sent: leave it out (a '#' in "
            "a name is written %23)"
        )
    if url.protocol == "file" and not text[len("file://") :].startswith("/"):
        raise ValueError(f"found '{text}', expected an absolute path after file:// (file:///...)")
    if not text.partition("://")[2].strip("/"):
        raise ValueError(f"found '{text}', expected a host or bucket and a path after it")
    return url


def home_expanded(text: str) -> Path:
    """A path whose ``~`` is the user's home, as in a shell; of an unknown user's it stays."""
    return Path(os.path.expanduser(text))


def named_location(text: str) -> Url | Path:
    """``parse_location`` for what a user named outside of a recipe.

    Raises:
        UserError: see ``parse_location``.
    """
    try:
        return parse_location(text)
    except ValueError as error:
        raise UserError(str(error)) from error


def refuse_url(value: object) -> object:
    """Check that a place to write to is no URL; it would become a strange folder name.

    Raises:
        ValueError: it is one.
    """
    if isinstance(value, str) and (_URL.match(value) or _TORN_URL.match(value)):
        raise ValueError(
            f"found '{value}', expected a path: URLs are for data and weights that are read"
        )
    return value
