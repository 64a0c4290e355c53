"""Writing files whole or not at all, with one clear sentence when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d3etr.errors import UserError


class DamagedFileError(UserError):
    """A file that d3etr wrote is not what it wrote."""


_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def clear_disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn "no space left" and "not allowed" into a sentence.

    Args:
        what: what was being written, as the subject of the sentence.
        folder: where, to say how much is free there.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"no space left: {what} could not be written to {folder}. What was saved "
                "before is intact. Free some space and run the same command again: it goes on "
                "from the last checkpoint."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{what} could not be written to {folder}: {error.strerror}. Choose another "
                "place with run.output, or change the folder's permissions."
            ) from error
        raise


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the folder of ``path``: a rename within it is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary place for a file or a folder that replaces ``path`` once the block ends well.

    It is in the same folder, where a rename is atomic, and survives a power cut where the system
    can promise that. A folder replaces none: what ``path`` was is to be removed in the block.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        if temporary.is_dir():
            sync_folder(temporary)
        else:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:  # renaming one link onto another of the same file would have left it
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file of a run whole or not at all.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    with clear_disk_errors(path.name, path.parent):
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """As ``write_text``, of a file that belongs to no run.

    Raises:
        OSError: what the system says; ``run.output`` would be no advice.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file of JSON that d3etr wrote.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it holds no JSON, or no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({_first_line(error)})") from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise DamagedFileError(f"{path} is damaged (found a {found}, expected an object)")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def link_or_copy(source: Path, target: Path) -> None:
    """Give ``source`` a second name, or copy it where the file system has no hard links.

    Only safe for files that are replaced and never written to in place.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _FULL:
            raise
        shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not a thing on every platform or network file system
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
