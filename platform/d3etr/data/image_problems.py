"""Why an image file could not be decoded, as a text that names the cause and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import UnidentifiedImageError

_HEAD_BYTES = 256
_FOREIGN = (
    (0, b"\x00\x05\x16\x07", "metadata that macOS stores next to a file", "remove it"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"<!DOCTYPE", "a web page", "download the picture again"),
    (0, b"<html", "a web page", "download the picture again"),
    (0, b"<svg", "an SVG drawing", "render it as PNG"),
    (0, b"<?xml", "an XML or SVG file", "render it as PNG"),
    (0, b"%PDF", "a PDF document", "render its pages as PNG"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (0, b"\x93NUMPY", "a NumPy array", "hand over numpy.load(FILE), or save it as PNG"),
    (0, b"\x89HDF", "an HDF5 file", "save its images as PNG"),
    (0, b"DDS ", "a DDS texture of an unsupported kind", "convert it to PNG"),
    (0, b"\xff\x0a", "a JPEG XL picture", "convert it to JPEG or PNG"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture", "convert it to JPEG or PNG"),
    (4, b"ftyphe", "a HEIC picture", "convert it to JPEG or PNG"),
    (4, b"ftypmif1", "a HEIF picture", "convert it to JPEG or PNG"),
    (4, b"ftypisom", "a video", "take its frames out as JPEG or PNG"),
    (4, b"ftypmp4", "a video", "take its frames out as JPEG or PNG"),
    (4, b"ftypqt", "a video", "take its frames out as JPEG or PNG"),
    (128, b"DICM", "a DICOM file", "convert it to PNG"),
)
"""(offset, bytes, what such a file is, what to do): what is often found in place of an image."""


def decoding_problem(source: Path | bytes, error: Exception) -> str:
    """What is wrong with an image file, and what to do.

    Args:
        source: the file, or its bytes.
        error: what reading or decoding it raised.
    """
    reading = _reading_problem(source, error)
    if reading is not None:
        return reading
    head, size = _head(source)
    if size == 0:
        return "cannot be decoded: the file is empty; copy it again"
    for offset, magic, kind, remedy in _FOREIGN:
        if head[offset:].lower().startswith(magic.lower()):
            return f"cannot be decoded: it is {kind}; {remedy}"
    if isinstance(error, MemoryError):
        return "cannot be decoded: its pixels need more memory than there is; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return (
            f"cannot be decoded: its {size} bytes are no image in a known format, or the header "
            "is damaged or has a size of 0; expected a whole JPEG, PNG, TIFF, BMP or WebP image"
        )
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return f"cannot be decoded: it is truncated ({size} bytes are there); copy it again"
    return f"cannot be decoded: it is damaged ({error or type(error).__name__}); copy it again"


def _reading_problem(source: Path | bytes, error: Exception) -> str | None:
    """The text for a file whose bytes cannot be had; None if they can."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such image file; check the path"
    if isinstance(error, IsADirectoryError):
        return "is a folder; expected an image file"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied; make it readable for this user (chmod u+r)"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(source, Path) and "\0" in str(source):
        return "no such image file: a path cannot contain a null character"
    return None


def _head(source: Path | bytes) -> tuple[bytes, int]:
    """(first bytes, number of bytes) of a file; nothing if it cannot be read any more."""
    if isinstance(source, bytes):
        return source[:_HEAD_BYTES], len(source)
    try:
        with source.open("rb") as file:
            return file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
    except OSError:
        return b"", -1
