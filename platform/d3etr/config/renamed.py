"""Keys of earlier versions, and what became of them.

A recipe, a run's stored configuration or a weights file that has one is read for one version after
the change, with a warning that names today's key. Whoever renames or removes a key adds a line to
``EARLIER_KEYS``; nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from d3etr.config.problems import Problem
from d3etr.logs import get_logger

logger = get_logger(__name__)

Tree = dict[str, Any]


@dataclass(frozen=True)
class Renamed:
    """Today's form of an earlier key whose values changed as well.

    Attributes:
        key: dotted; the earlier key itself where only its values were renamed.
        convert: today's value, from the earlier one and the section that held it; None leaves
            the key to its default. May raise ValueError, which says what to do.
    """

    key: str
    convert: Callable[[Any, Mapping[str, Any]], Any]


def _as_factor(rate: Any, section: Mapping[str, Any]) -> float | None:
    """A learning rate of its own as a factor on ``learning_rate``."""
    base = section.get("learning_rate", 1e-4)
    if rate is None:
        return None
    if not (_is_number(rate) and _is_number(base) and base > 0):
        raise ValueError("is no longer read: set {key}, a factor on learning_rate")
    return float(f"{rate / base:.12g}")


def _other_names(**today: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Earlier names of a key's values -> today's; others are left to validation."""
    return lambda value, _: today.get(value, value) if isinstance(value, str) else value


_HEADS = _other_names(apart="per_head", averaged="mean")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


EARLIER_KEYS: Mapping[str, str | Renamed | None] = MappingProxyType(
    {
        "optimisation.backbone_learning_rate": Renamed(
            "optimisation.backbone_rate_factor", _as_factor
        ),
        "optimisation.sampling_learning_rate": Renamed(
            "optimisation.sampling_rate_factor", _as_factor
        ),
        "teacher.cache_gigabytes": None,
        "student.detector.first_looks": Renamed(
            "student.detector.cross_attention_init",
            _other_names(anywhere="random", reference="reference_prior"),
        ),
        **{
            f"distillation.{term}.heads": Renamed(f"distillation.{term}.heads", _HEADS)
            for term in ("self_attention", "cross_attention")
        },
    }
)
"""Dotted key of an earlier version -> today's key; None where it has no effect any more."""


def with_current_keys(
    tree: Tree, below: str = "", *, warn: bool = True
) -> tuple[Tree, list[Problem]]:
    """A tree with today's keys in place of earlier ones; a warning names each that was there.

    Args:
        tree: raw values of a configuration, or of one section; it stays as it is.
        below: the section's dotted path.
        warn: False for a file that no person writes.

    Returns:
        The new tree, and what was wrong with earlier keys (those are left out).
    """
    problems: list[Problem] = []
    say = _warn_once if warn else _ignore
    start = f"{below}." if below else ""
    for earlier, change in EARLIER_KEYS.items():
        path = earlier.removeprefix(start).split(".")
        section = _section(tree, path[:-1])
        if not earlier.startswith(start) or section is None or path[-1] not in section:
            continue
        value = section[path[-1]]
        tree = _without(tree, path)
        if change is None:
            say(f"{earlier} has no effect any more: remove it")
            continue
        try:
            tree, text = _moved(tree, start, earlier, change, value, section)
            if text:
                say(text)
        except ValueError as error:
            problems.append(Problem(earlier, str(error)))
    return tree, problems


def _moved(
    tree: Tree,
    start: str,
    earlier: str,
    change: str | Renamed,
    value: Any,
    section: Mapping[str, Any],
) -> tuple[Tree, str]:
    """The tree with an earlier key's value under today's key, and what became of it.

    Raises:
        ValueError: it is there already, or the value has no counterpart today.
    """
    key = change if isinstance(change, str) else change.key
    (above, _, _), (here, _, name) = earlier.rpartition("."), key.rpartition(".")
    shown = name if above == here else key
    path = key.removeprefix(start).split(".")
    if key != earlier and path[-1] in (_section(tree, path[:-1]) or {}):
        raise ValueError(f"is the older name of {shown}: set only {shown}")
    found = value
    if isinstance(change, Renamed):
        try:
            found = change.convert(value, section)
        except ValueError as error:
            raise ValueError(str(error).format(key=shown)) from error
        if found is None:
            return tree, ""
    changed = key != earlier or found != value
    shown_value = f"{found:g}" if isinstance(found, float) else f"{found}"
    return _with(tree, path, found), f"{earlier} is now {shown}: {shown_value}" if changed else ""


@cache
def _warn_once(text: str) -> None:
    """A sweep reads its recipe for every trial: one line is enough."""
    logger.warning("%s", text)


def _ignore(text: str) -> None:
    pass


def _section(tree: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    for part in path:
        below = tree.get(part)
        if not isinstance(below, dict):
            return None
        tree = below
    return tree


def _without(tree: Tree, path: Sequence[str]) -> Tree:
    first, *rest = path
    if rest:
        return tree | {first: _without(tree[first], rest)}
    return {key: value for key, value in tree.items() if key != first}


def _with(tree: Tree, path: Sequence[str], value: Any) -> Tree:
    first, *rest = path
    below = tree.get(first)
    inside = below if isinstance(below, dict) else {}
    return tree | {first: _with(inside, rest, value) if rest else value}
