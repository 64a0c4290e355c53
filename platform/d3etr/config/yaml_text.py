"""YAML as a configuration needs it: version 1.2's numbers and booleans, no duplicate keys."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from d3etr.config.problems import ConfigError, Problem

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
    """A safe loader that refuses a key given twice."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = _constructors()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        details = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(source, [Problem("", place + details)]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [Problem("", f"not YAML: {error}")]) from None


def dump_yaml(tree: Any) -> str:
    """Write a tree of plain values so that ``parse_yaml`` reads the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
