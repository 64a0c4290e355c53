"""What a command consists of, and the arguments that several share."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3etr.errors import UserError
from d3etr.files import temporary_beside
from d3etr.text import printable

if TYPE_CHECKING:
    from d3etr.config.urls import Url

USER_MISTAKE = 2
"""Exit code of a mistake that the user can fix."""
SOME_FAILED = 2
"""Exit code where a picture could not be used; the others are answered."""
_MOST_DIGITS = 12
_SUFFIXES_OF_FILES = (
    *(".safetensors", ".onnx", ".pt", ".pth", ".bin", ".ckpt", ".engine", ".torchscript"),
    *(".json", ".zip", ".tar", ".gz"),
)
"""Of what nobody calls a folder; others, such as that of ``detr-v1.5``, may be part of a name."""


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
        help="YAML file, or the name of a recipe that comes with d3etr, for example digits/plain",
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


def add_weights(parser: ArgumentParser, other: str = "") -> None:
    """The weights file that a command is about; ``other`` names what else it takes."""
    parser.add_argument(
        "weights",
        type=_weights,
        metavar="WEIGHTS",
        help=f"a run's weights.safetensors{other}, or its URL; or a model of MLflow's registry "
        "(models:/NAME@champion)",
    )


def add_json(parser: ArgumentParser) -> None:
    """``--json`` for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_output_root(parser: ArgumentParser) -> None:
    """``--output-root``: where a run that is named by its beginning is looked for."""
    parser.add_argument(
        "--output-root",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="the folder that holds runs (default runs)",
    )


def add_launcher(parser: ArgumentParser, *choices: str) -> None:
    """``--launcher``, one of ``choices``; the first is the default."""
    about = {
        "ray": "Ray Train (default)",
        "local": "this process",
        "torchrun": "as one of its workers",
    }
    text = "; ".join(f"{name}: {about[name]}" for name in choices)
    parser.add_argument("--launcher", choices=choices, default=choices[0], help=text)


def add_device(parser: ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device", help="for example cpu or cuda:1; default: the first GPU, if any"
    )


def location(text: str) -> Url | Path:
    """A path or a URL, as an argument's type."""
    from d3etr.config.urls import parse_location

    try:
        return parse_location(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _weights(text: str) -> Url | Path:
    """``location``, or the address of a registered model, as a path that is spelt like it."""
    from d3etr.loading import is_registered

    return Path(text) if is_registered(text) else location(text)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number in [low, high]."""

    def parse(text: str) -> int:
        number = int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else -1
        if number < low or (high is not None and number > high):
            expected = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ArgumentTypeError(f"found '{text}', expected a whole number {expected}")
        return number

    return parse


positive = whole_number(1)
"""A whole number of at least 1, as an argument's type."""


def above_zero(text: str) -> float:
    """A finite number above 0, as an argument's type."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"found '{text}', expected a number above 0")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1, as an argument's type."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"found '{text}', expected a number from 0 to 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def file_to_write(*suffixes: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write, in the one format that is written."""

    def parse(text: str) -> Path:
        path = location(text)
        if not isinstance(path, Path):
            raise ArgumentTypeError(f"found the URL {path.shown}, expected a file on this machine")
        if path.suffix.lower() not in suffixes:
            raise ArgumentTypeError(
                f"found '{text}', expected a name that ends with {' or '.join(suffixes)}: no other "
                "format is written"
            )
        if os.path.isdir(path):  # False for names that are too long: writing says it
            raise ArgumentTypeError(f"found the folder '{text}', expected a file to write")
        return path

    return parse


def folder_to_write(text: str) -> Path:
    """The type of an argument that names a folder to make; a suffix would name a file."""
    path = location(text)
    if not isinstance(path, Path):
        raise ArgumentTypeError(f"found the URL {path.shown}, expected a folder on this machine")
    if path.suffix.lower() in _SUFFIXES_OF_FILES:
        raise ArgumentTypeError(f"found the file name '{text}', expected a folder to make")
    return path


def ensure_other_file(source: Url | Path, target: Path) -> None:
    """Refuse to write over the file that is read.

    Raises:
        UserError: both are the same file.
    """
    # Not Path.resolve: links in a circle are an error to it.
    if isinstance(source, Path) and os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"{target} is the file that is read; choose another name to write to")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while a file is written into a user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another place, or make room"
        ) from error


def ensure_writable(path: Path) -> None:
    """Make the folder of a file, before the long work whose result it is to hold.

    Raises:
        UserError: the folder cannot be made, or takes no files.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(path)
        probe.touch()
        probe.unlink()


def complain(text: str) -> None:
    """Name on standard error what is left out or could not be used."""
    print(printable(text), file=sys.stderr)


def answer(options: Namespace, value: Any, text: str | Callable[[], None]) -> None:
    """Print what a command found: as JSON with ``--json``, else for people.

    Args:
        options: of a command that has ``add_json``.
        value: plain values.
        text: the same as text, or what prints it.
    """
    if options.json:
        print_json(value)
    elif isinstance(text, str):
        print(text)
    else:
        text()


def print_json(value: Any) -> None:
    """Print one JSON document; NaN and infinity are programmer errors.

    What would act on a terminal, or what standard output cannot say, is escaped.
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8", "surrogatepass")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, allow_nan=False)
    print(printable(text, "\n"))
