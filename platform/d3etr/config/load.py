"""From a recipe file and ``--set`` to a validated configuration, and back to YAML."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from d3etr.config.base import Section
from d3etr.config.infrastructure import RunConfig
from d3etr.config.overrides import Tree, apply_overrides, merge, overridden_paths
from d3etr.config.problems import ConfigError, Problem, problems_of, shown
from d3etr.config.renamed import with_current_keys
from d3etr.config.shipped import find_recipe, place_weights
from d3etr.config.tree import Config
from d3etr.config.yaml_text import MAXIMUM_DEPTH, dump_yaml, parse_yaml, read_text

SectionType = TypeVar("SectionType", bound=Section)

WITHOUT_INFLUENCE: Mapping[str, frozenset[str]] = {
    "run": frozenset(RunConfig.model_fields) - {"seed"},
    "data": frozenset({"workers"}),
    "student": frozenset({"pretraining"}),
    "teacher.views": frozenset({"folder", "maximum_gigabytes"}),
}
"""Keys that change where and how fast a run happens, never its result."""
SECTIONS_WITHOUT_INFLUENCE = frozenset({"cluster", "tracking"})


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, put overrides on top and validate.

    Args:
        path: a YAML recipe, or the name of a shipped one, such as ``digits/d3etr``; None starts
            from an empty one. A recipe may say ``extends: other.yaml`` (relative to itself, or a
            shipped name; or a list, later ones win) and is merged over what it extends.
        overrides: ``a.b=c`` texts; values are YAML.

    Raises:
        ConfigError: listing every problem with its dotted path, what was found and what is
            allowed.
    """
    if path is None:
        return validate({}, "the configuration", overrides)
    path = find_recipe(path)
    return validate(read_recipe(path), str(path), overrides)


def validate(tree: Tree, source: str, overrides: Sequence[str] = ()) -> Config:
    """Turn a tree of plain values, with overrides on top, into a configuration.

    Args:
        tree: what YAML holds.
        source: what error texts call it.
        overrides: ``a.b=c`` texts.

    Raises:
        ConfigError: listing every problem.
    """
    return validate_section(Config, tree, source, overrides)


def validate_section(
    section: type[SectionType],
    tree: Tree,
    source: str,
    overrides: Sequence[str] = (),
    below: str = "",
) -> SectionType:
    """``validate`` for a section that stands alone.

    Args:
        section: its model.
        tree: what YAML holds.
        source: what error texts call it.
        overrides: ``a.b=c`` texts.
        below: the section's dotted path in the whole configuration, for keys of earlier versions.

    Raises:
        ConfigError: listing every problem.
    """
    tree, problems = apply_overrides(tree, overrides)
    tree, of_earlier_keys = with_current_keys(tree, below)
    problems += of_earlier_keys
    try:
        validated = section.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        set_paths = overridden_paths(overrides)
        problems += [_with_origin(problem, set_paths) for problem in problems_of(error, section)]
    if problems:
        raise ConfigError(f"{source} with --set" if overrides else source, problems)
    return validated


def read_recipe(
    path: Path, below: tuple[Path, ...] = (), known: dict[Path, Tree] | None = None
) -> Tree:
    """Read a recipe file and everything that it extends.

    Args:
        path: the file.
        below: the files that extend this one; finds circles.
        known: what was read before, by file: several may extend one.

    Raises:
        ConfigError: if a file is missing, not YAML, not a mapping, or extends itself.
    """
    known = {} if known is None else known
    resolved = _resolved(path)
    if resolved in known:
        return known[resolved]
    if resolved in below:
        chain = " -> ".join(file.name for file in (*below, resolved))
        raise ConfigError(str(path), [Problem("extends", f"goes in a circle: {chain}")])
    if len(below) > MAXIMUM_DEPTH:
        raise ConfigError(str(path), [Problem("extends", f"more than {MAXIMUM_DEPTH} files deep")])
    tree = parse_yaml(read_text(path), str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        text = f"found {shown(tree)}, expected sections such as 'run:' and 'data:'"
        raise ConfigError(str(path), [Problem("", text)])
    base: Tree = {}
    for name in _extended(tree.pop("extends", None), path):
        extended = find_recipe(name, path.parent)
        base = merge(base, read_recipe(extended, (*below, resolved), known))
    known[resolved] = merge(base, place_weights(tree, path.parent))
    return known[resolved]


def to_yaml(config: Config) -> str:
    """Every value in effect, as YAML that loads back to an equal configuration."""
    return dump_yaml(plain_tree(config))


def plain_tree(config: Section) -> Tree:
    """Every value in effect, as plain JSON values.

    Settings that the configuration says are without effect are left out: loading refuses them.
    """
    tree = config.model_dump(mode="json", exclude=set(config.without_effect))
    for name in tree:
        value = getattr(config, name)
        if isinstance(value, Section):
            tree[name] = plain_tree(value)
    return tree


def config_digest(config: Config) -> str:
    """8 hex digits over everything that changes a run's results.

    Values that are the default's are left out: a setting that a later version adds does not turn
    the runs of before into others.
    """
    tree: dict[str, Any] = _changed(config)
    kept = {
        section: _influential(value, section)
        for section, value in tree.items()
        if section not in SECTIONS_WITHOUT_INFLUENCE
    }
    # What is left of a section may be nothing: then it is as if it were not there.
    kept = {section: value for section, value in kept.items() if value != {}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _changed(config: Section, reference: object = None) -> Tree:
    """The values in effect that are not the defaults.

    Args:
        config: a section.
        reference: what it is by default, maybe of another class: its values are the defaults of
            the keys that it has.
    """
    tree = plain_tree(config)
    for name in list(tree):
        field, value = type(config).model_fields[name], getattr(config, name)
        default = field.get_default(call_default_factory=True)
        default = getattr(reference, name, default)
        if isinstance(value, Section):
            tree[name] = _changed(value, default)
            if not tree[name] and isinstance(default, Section):
                del tree[name]
        elif value == default and (reference is not None or not field.is_required()):
            del tree[name]
    return tree


def _influential(section: Any, at: str) -> Any:
    """What changes results of a section and those below it; ``at`` is its dotted path."""
    if not isinstance(section, dict):
        return section
    dropped = WITHOUT_INFLUENCE.get(at, frozenset())
    kept = {key: value for key, value in section.items() if key not in dropped}
    return {key: _influential(value, f"{at}.{key}") for key, value in kept.items()}


def _with_origin(problem: Problem, set_paths: set[str]) -> Problem:
    """Say so when the value came from the command line."""
    path = problem.path
    from_set = any(
        path == place or path.startswith((f"{place}[", f"{place}.")) for place in set_paths
    )
    return Problem(path, f"{problem.text} (from --set)") if from_set else problem


def _extended(value: Any, path: Path) -> list[str]:
    """The names in a recipe's ``extends``."""
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text = f"found {shown(value)}, expected a file name or a list of them"
        raise ConfigError(str(path), [Problem("extends", text)])
    return names


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL in the name
        raise ConfigError(str(path), [Problem("", f"cannot be read: {error}")]) from None
