"""Fonts that have the letters of class names, whatever their script."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager, get_data_path

from d3etr.logs import get_logger

logger = get_logger(__name__)

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SCALABLE = 1
"""FreeType's flag of a face that has outlines; those of coloured bitmaps have one size only."""
_SHOWN = 5


def readable_names(categories: Iterable[tuple[int, str]]) -> list[str]:
    """What a picture calls each class: its name, or its id where no font here has the letters.

    Names that are replaced are listed in one warning.

    Args:
        categories: (id, name) of each.
    """
    found, replaced = [], {}
    for number, name in categories:
        text = _CONTROLS.sub(" ", name)
        if font_for(text) is None:
            text = f"id {number}"
            replaced[name] = f"{name!a} is '{text}'"
        found.append(text)
    if replaced:
        _warn(tuple(replaced.values()))
    return found


@cache
def _warn(replaced: tuple[str, ...]) -> None:
    """Once for the same names, not once a picture."""
    more = f" and {len(replaced) - _SHOWN} more" if len(replaced) > _SHOWN else ""
    logger.warning(
        "no font on this machine has the letters of %d class names, pictures show their ids: %s%s. "
        "Install one for their script, such as Noto Sans CJK",
        len(replaced),
        ", ".join(replaced[:_SHOWN]),
        more,
    )


@lru_cache(maxsize=4096)
def font_for(text: str) -> Path | None:
    """A font file with every character of ``text``: DejaVu Sans, else one of this machine's."""
    needed = frozenset(char for char in text if not char.isspace())
    own = default_font()
    if _has(own, needed):
        return own
    return next((file for file in _system_fonts() if _has(file, needed)), None)


def default_font() -> Path:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic and more."""
    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _system_fonts() -> tuple[Path, ...]:
    """Regular faces first, else by name."""
    files = [Path(file) for file in font_manager.findSystemFonts()]
    return tuple(sorted(files, key=lambda file: ("regular" not in file.stem.lower(), str(file))))


def _has(file: Path, characters: frozenset[str]) -> bool:
    try:
        font = font_manager.get_font(str(file))
        flags: Any = font.face_flags  # a number before matplotlib 3.10
        outlines = int(getattr(flags, "value", flags)) & _SCALABLE
        return bool(outlines) and all(font.get_char_index(ord(char)) for char in characters)
    except (OSError, RuntimeError):  # not every font file is one
        return False
