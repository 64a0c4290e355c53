"""Where recipes, sweeps and weights are: those of the user, and those that come with d3etr.

A checkout has ``trainers/`` and ``sweeps/`` at its top; an installed package has the same folders
inside. Whatever a user names is looked for in the working directory first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from d3etr.config.overrides import Tree, apply_overrides
from d3etr.config.problems import ConfigError, Problem
from d3etr.config.yaml_text import dump_yaml_line
from d3etr.text import nearest

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "shipped"
_RECIPES = Path("trainers", "recipes")
_ENDS = ("", ".yaml")
"""A shipped name is a path below trainers/recipes or sweeps with or without its ending."""
_WEIGHTS = (
    ("student", "backbone_weights"),
    ("student", "initialise_from", "weights"),
    ("teacher", "weights"),
)
_NO_FILE = "imagenet"
"""A value of ``student.backbone_weights`` that is no path."""


def shipped_folder() -> Path:
    """The folder of ``trainers/`` and ``sweeps/`` that this d3etr came with."""
    return _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parents[1]


def recipes_folder() -> Path:
    """``trainers/recipes`` of the working directory, if it has one; else what was shipped.

    Shipped weights are in ``../weights``.
    """
    return _RECIPES if (_RECIPES / "digits").is_dir() else shipped_folder() / _RECIPES


def recipe_names() -> list[str]:
    """The shipped recipes by name, such as ``digits/d3etr``; bases of others are left out."""
    folder = shipped_folder() / _RECIPES
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if not path.name.endswith("base"))


def sweep_names() -> list[str]:
    """The shipped sweeps by name, such as ``ablation``."""
    return sorted(path.stem for path in (shipped_folder() / "sweeps").glob("*.yaml"))


def find_recipe(name: str | Path, *starts: Path) -> Path:
    """The file of a recipe that is named by its path or by its shipped name.

    Args:
        name: such as ``digits/d3etr`` or ``my/recipe.yaml``.
        starts: folders that a relative path may start at, the first that has it wins; none: the
            working directory.

    Raises:
        ConfigError: neither a file nor a shipped name; the nearest name is given. A YAML file
            that is missing in a folder that is there is returned: reading it names its neighbours.
    """
    return _find(name, starts, _RECIPES, "recipe", recipe_names)


def find_sweep_file(name: str | Path) -> Path:
    """``find_recipe`` for a sweep, such as ``ablation`` or ``my/sweep.yaml``.

    Raises:
        ConfigError: as for ``find_recipe``.
    """
    return _find(name, (), Path("sweeps"), "sweep", sweep_names)


def place_weights(tree: Tree, folder: Path) -> Tree:
    """A recipe's tree in which weights that lie next to the recipe are found.

    A relative path to weights starts at the working directory if there is something; else at the
    recipe's folder, if the file is there; else it stays as it is.

    Args:
        tree: of a recipe or of overrides; not changed.
        folder: of the file that it was read from.
    """
    for keys in _WEIGHTS:
        tree = _placed(tree, keys, folder)
    return tree


def place_overrides(overrides: Iterable[str], folder: Path) -> list[str]:
    """``place_weights`` for the ``a.b=c`` texts of a sweep file in ``folder``."""
    placed = []
    for override in overrides:
        tree, _ = apply_overrides({}, [override])
        value: Any = place_weights(tree, folder)
        key = override.partition("=")[0].strip()
        if value is not tree:
            for part in key.split("."):
                value = value[part]
            override = f"{key}={dump_yaml_line(value)}"
        placed.append(override)
    return placed


def _placed(tree: Tree, keys: tuple[str, ...], folder: Path) -> Tree:
    key, *below = keys
    value = tree.get(key)
    if below:
        changed = _placed(value, tuple(below), folder) if isinstance(value, dict) else value
    elif isinstance(value, str) and value != _NO_FILE and not os.path.exists(value):
        found = folder / value
        changed = str(_normal(found)) if os.path.isfile(found) else value
    else:
        changed = value
    return tree if changed is value else tree | {key: changed}


def _find(
    name: str | Path,
    starts: tuple[Path, ...],
    below: Path,
    kind: str,
    names: Callable[[], list[str]],
) -> Path:
    own = [start / name for start in starts] or [Path(name)]
    # The paths of a checkout, which the guides name, are found in an installed package too.
    shipped = [shipped_folder() / start / f"{name}{end}" for start in (below, "") for end in _ENDS]
    for path in (*own, *shipped):
        if os.path.exists(path) and not os.path.isdir(path):
            return path if path == Path(name) else _normal(path)
    place = own[0]
    if os.path.isdir(place) or (place.suffix and os.path.isdir(place.parent)):
        return place
    text = f"No such file, and no {kind} of this name comes with d3etr"
    raise ConfigError(str(name), [Problem("", f"{text}; {nearest(str(name), names())}")])


def _normal(path: Path) -> Path:
    """``path`` without ``..``, where that is the same file: links may lead elsewhere."""
    normal = Path(os.path.normpath(path))
    return normal if os.path.exists(normal) and normal.samefile(path) else path
