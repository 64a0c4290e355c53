"""What a command consists of, and the arguments that several share."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d3etr.config.location import Url


@dataclass(frozen=True)
class Command:
    """One subcommand of ``d3etr``.

    Attributes:
        name: as typed.
        summary: one line for the list of commands.
        add_arguments: declares its arguments.
        run: does it and returns the exit code; imports what is slow to import.
    """

    name: str
    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def add_recipe(parser: ArgumentParser, *, optional: bool = False) -> None:
    """A recipe and values on top of it."""
    parser.add_argument(
        "recipe",
        type=Path,
        nargs="?" if optional else None,
        metavar="RECIPE",
        help="YAML file, for example trainers/recipes/digits/plain.yaml",
    )
    add_overrides(parser)


def add_overrides(parser: ArgumentParser) -> None:
    """``--set``, as often as needed."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change one value, for example --set optimisation.learning_rate=1e-4; repeatable",
    )


def add_weights(parser: ArgumentParser) -> None:
    """The weights file that a command is about."""
    parser.add_argument(
        "weights", type=location, metavar="WEIGHTS", help="a run's weights.safetensors, or its URL"
    )


def add_json(parser: ArgumentParser) -> None:
    """``--json`` for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_device(parser: ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device", help="for example cpu or cuda:1; default: the first GPU, if any"
    )


def location(text: str) -> Url | Path:
    """A path or a URL, as an argument's type."""
    from d3etr.config.location import parse_location

    try:
        return parse_location(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ArgumentTypeError(f"found '{text}', expected a whole number of at least 1")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1, as an argument's type."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"found '{text}', expected a number from 0 to 1")
    return number


def print_json(value: Any) -> None:
    """Print one JSON document; NaN and infinity are programmer errors.

    What standard output cannot say, such as file names that are not UTF-8, is escaped.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, allow_nan=False)
    print(text)
