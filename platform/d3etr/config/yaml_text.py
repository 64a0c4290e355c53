"""YAML as a configuration needs it: version 1.2's numbers and booleans, no key twice."""

import difflib
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from d3etr.config.problems import ConfigError, Problem

MAXIMUM_VALUES = 20_000
"""Of a document, with aliases written out."""
MAXIMUM_DEPTH = 40
MAXIMUM_BYTES = 500_000
"""Of a file; recipes have a few thousand."""
MAXIMUM_DIGITS = 30
_TOO_DEEP = f"is nested deeper than {MAXIMUM_DEPTH} levels"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_TAG = "tag:yaml.org,2002:"
# Version 1.1, which PyYAML reads, takes 1e-4 for text, "no" for false, 12:30 for 750 and
# 2024-01-01 for a date.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's table: a scalar's first character to the kinds it may be ("" if empty)."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, first_characters in _SCALARS:
        for first in first_characters:
            entry = (_TAG + kind, re.compile(f"(?:{pattern})$"))
            table.setdefault(first.strip("\0"), []).append(entry)
    return table


def _constructors() -> dict[str | None, Any]:
    """PyYAML's constructors of what JSON can hold; any other tag is an error with its line."""
    kinds = ("null", "bool", "int", "float", "str", "seq", "map")
    known = yaml.SafeLoader.yaml_constructors
    return {None: known[None]} | {_TAG + kind: known[_TAG + kind] for kind in kinds}


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and what no recipe needs in size and depth."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = _constructors()

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = self._depth = 0
        self._sizes: dict[str | None, int] = {}  # of anchors: values with aliases written out

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        if isinstance(event, yaml.AliasEvent):
            meant = self._sizes.get(event.anchor)
            if meant is None:
                raise _problem("an alias stands for something that it is a part of", event)
            self._values += meant
        self._values += 1
        self._depth += 1
        if self._values > MAXIMUM_VALUES:
            raise _problem(f"aliases make more than {MAXIMUM_VALUES:,} values: write it out", event)
        if self._depth > MAXIMUM_DEPTH:
            raise _problem(_TOO_DEEP, event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[event.anchor] = self._values - before
        if node is not None and node.tag == f"{_TAG}int" and len(node.value) > MAXIMUM_DIGITS:
            digits = f"a number of {len(node.value):,} digits"
            raise _problem(f"found {digits}, expected {MAXIMUM_DIGITS} at most", node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue
            if key.value in seen and key.value != "<<":
                raise _problem(f"key '{key.value}' is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes what the loader above would read as something else than text."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(text: str, source: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        source: what error texts call it.

    Raises:
        ConfigError: with line and column, if the text is not YAML or repeats a key.
    """
    try:
        tree = yaml.load(text, _Loader)
        _refuse_depth(tree, source)
        return tree
    except RecursionError:
        raise ConfigError(source, [Problem("", _TOO_DEEP)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        details = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(source, [Problem("", place + details)]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [Problem("", f"not YAML: {error}")]) from None


def _refuse_depth(tree: Any, source: str, depth: int = 0) -> None:
    """Aliases of aliases may nest deeper than the text does."""
    if depth > MAXIMUM_DEPTH:
        raise ConfigError(source, [Problem("", _TOO_DEEP)])
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for part in parts:
        _refuse_depth(part, source, depth + 1)


def dump_yaml(tree: Any) -> str:
    """Write a tree of plain values so that ``parse_yaml`` reads the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_yaml_line(tree: Any) -> str:
    """``dump_yaml`` in one line, as values after ``--set`` are written."""
    style: dict[str, Any] = {"default_flow_style": True, "width": math.inf}
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    return text.removesuffix("...\n").strip()


def read_text(path: Path) -> str:
    """The text of a recipe or sweep file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is far too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_BYTES + 1)
        if len(content) > MAXIMUM_BYTES:
            problem = f"is larger than {MAXIMUM_BYTES:,} bytes: this is no recipe"
        else:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16 text" if content.startswith(_UTF_16) else "not UTF-8 text"
        problem = f"{kind} (byte {error.start}): save it as UTF-8"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}{_neighbour(path)}"
    except ValueError as error:  # a NUL in the name
        problem = f"cannot be read: {error}"
    raise ConfigError(str(path), [Problem("", problem)])


def _neighbour(path: Path) -> str:
    """The file that was probably meant."""
    names = [file.name for file in path.parent.glob("*.yaml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / close[0]}'?" if close else ""
