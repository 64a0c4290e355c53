"""Checks of what Python callers hand over: type and bounds, before anything is done with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from d3etr.config.urls import Url, named_location
from d3etr.errors import UserError
from d3etr.text import bare_url, nearest

MAXIMUM_SHOWN = 40
"""Characters of a value that are quoted."""


def described(value: object) -> str:
    """A value as an error text names it: short, with its type where that helps."""
    shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
    if dtype is not None and shape:
        kind = "an array" if type(value).__module__ == "numpy" else f"a {type(value).__name__}"
        return f"{kind} {list(shape)} of {dtype}"
    if value is not None and dtype is None and not isinstance(value, str | int | float):
        return (
            f"{'an' if type(value).__name__[0].lower() in 'aeiou' else 'a'} {type(value).__name__}"
        )
    try:
        text = repr(str(value)) if isinstance(value, str) else str(value)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= MAXIMUM_SHOWN else f"{text[:MAXIMUM_SHOWN]}..."


def require_number(name: str, value: Any, low: float, high: float) -> float:
    """A real number in [low, high].

    Raises:
        UserError: something else, or not a number at all.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and low <= value <= high:
        return float(value)
    raise UserError(f"{name} is {described(value)}; expected a number from {low:g} to {high:g}")


def require_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high].

    Raises:
        UserError: something else.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and low <= value <= high:
        return int(value)
    raise UserError(f"{name} is {described(value)}; expected a whole number from {low} to {high}")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of ``choices``.

    Raises:
        UserError: something else.
    """
    if isinstance(value, str) and value in choices:
        return value
    near = nearest(value, choices) if isinstance(value, str) else "expected " + " or ".join(choices)
    raise UserError(f"{name} is {described(value)}; {near}")


def require_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        UserError: something else.
    """
    if isinstance(value, bool):
        return value
    raise UserError(f"{name} is {described(value)}; expected True or False")


def require_location(name: str, value: Any, expected: str = "a path or URL") -> Url | Path:
    """A path, or a URL given as text.

    Raises:
        UserError: something else, an empty text, or a URL with a slip in it.
    """
    if isinstance(value, Url):
        return value
    text = os.fsdecode(value) if isinstance(value, str | os.PathLike) else None
    if not text or "\0" in text:
        raise UserError(f"{name} is {described(value)}; expected {expected}")
    return named_location(text) if isinstance(value, str) else Path(text)


def require_path(name: str, value: Any) -> Path:
    """A path on this machine.

    Raises:
        UserError: something else, an empty text, or a URL.
    """
    if isinstance(value, str | Url) and "://" in str(value):
        url = bare_url(str(value))
        raise UserError(f"{name} is the URL {url}; expected a path: download it first")
    location = require_location(name, value, "a path")
    assert isinstance(location, Path)  # a URL has a protocol
    return location
