"""``--set a.b=c``: values put into a configuration tree by dotted path."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from pathlib import PurePath
from typing import Any

from yaml import YAMLError

from d3etr.config.arguments import described
from d3etr.config.location import Url
from d3etr.config.problems import ConfigError, Problem, shown
from d3etr.config.yaml_text import dump_yaml, parse_yaml

Tree = dict[str, Any]
INDICATORS = frozenset("-?:,[]{}#&*!|>'\"%@`")
"""Of YAML: what begins so is no plain text, or may be none."""


def merge(base: Tree, changes: Mapping[str, Any]) -> Tree:
    """``changes`` on top of ``base``: sections are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> tuple[Tree, list[Problem]]:
    """Put each ``a.b=c`` into the tree, later ones over earlier ones.

    The value is read as YAML. A section that is missing or null is made; a list is replaced
    as a whole.

    Returns:
        The new tree, and what was wrong with overrides (those are left out).
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            path, value = _parse(override)
            tree = _put(tree, path, value, override)
        except ConfigError as error:
            problems += error.problems
    return tree, problems


def overridden_paths(overrides: Sequence[str]) -> set[str]:
    """The dotted paths that well-formed overrides set."""
    return {override.split("=", 1)[0].strip() for override in overrides if "=" in override}


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Nested or dotted keyword arguments as ``a.b=c`` texts.

    ``{"run": {"seed": 1}, "data.workers": 0}`` gives ``["run.seed=1", "data.workers=0"]``.
    """
    try:
        return [f"{path}={_as_text(path, value)}" for path, value in _leaves(changes)]
    except RecursionError:
        problem = Problem("", "sections that contain themselves, or are nested too deeply")
        raise ConfigError("the overrides", [problem]) from None


def _leaves(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _as_text(path: str, value: Any) -> str:
    try:
        return dump_yaml(_plain(value)).removesuffix("...\n").strip()
    except (YAMLError, ValueError) as error:  # a type without YAML, or digits without end
        text = f"found {described(value)}, expected text, a number, true, false, a list or null"
        raise ConfigError("the overrides", [Problem(path, text)]) from error


def _plain(value: Any) -> Any:
    """Paths, URLs, tuples and NumPy's numbers as what YAML has."""
    if isinstance(value, PurePath | Url):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset | bytes):
        raise ValueError("YAML's tags for these are not read")
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    return value


def _parse(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        problem = Problem("", f"--set {override!r}: expected KEY=VALUE such as run.seed=1")
        raise ConfigError("--set", [problem])
    try:
        return parts, _whole(text.strip(), parse_yaml(text, "--set"))
    except ConfigError as error:
        found = [Problem(path, f"--set value {text!r}: {p.text}") for p in error.problems]
        raise ConfigError("--set", found) from None


def _whole(text: str, value: Any) -> Any:
    """The value, with what follows " #" in plain text: no comment is meant after --set."""
    plain = isinstance(value, str) and text[:1] not in INDICATORS and "\n" not in text
    return text if plain else value


def _put(tree: Tree, path: Sequence[str], value: Any, override: str) -> Tree:
    """The tree with ``value`` at ``path``; the given tree stays as it is."""
    first, *rest = path
    if not rest:
        return tree | {first: value}
    section = tree.get(first)
    if section is not None and not isinstance(section, dict):
        text = f"--set {override!r}: '{first}' is {shown(section)}, not a section"
        raise ConfigError("--set", [Problem("", text)])
    return tree | {first: _put(section or {}, rest, value, override)}
