"""Which folder is a run's: by its configuration, or by its name."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from d3etr.config.base import Section
from d3etr.config.infrastructure import RunConfig
from d3etr.config.load import (
    SECTIONS_WITHOUT_INFLUENCE,
    WITHOUT_INFLUENCE,
    config_digest,
    load_config,
    plain_tree,
    to_yaml,
)
from d3etr.config.overrides import Tree, apply_overrides
from d3etr.config.problems import ConfigError, problems_of
from d3etr.config.tree import Config
from d3etr.engine.run_folder import CONFIG_FILE, RunFolder
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors, write_text

AnySection = TypeVar("AnySection", bound=Section)

SHOWN_RUNS = 10
"""So many folders are listed where a name does not fit one."""


def folder_of(config: Config) -> RunFolder:
    """The folder of a configuration's run: the one that it was started in, or a new one.

    Its name holds a digest that leaves defaults out. Whose run it is, the configuration in it
    decides, which has every value: another version of d3etr may have other defaults, other names
    of keys and another digest. A key that was added since has its default.
    """
    output, name = config.run.output.absolute(), f"{config.run.name}-{config_digest(config)}"
    first = RunFolder(output / name)
    kept = first.read_config()
    # Other places with the same content are the same run, and other content is noticed.
    if kept is not None and config_digest(_placeless(kept)) == config_digest(_placeless(config)):
        return first
    called = folders_called(config.run.name)
    for file in sorted(output.glob(f"{glob.escape(config.run.name)}-*/{CONFIG_FILE}")):
        run = RunFolder(file.parent)
        if called.fullmatch(run.path.name) and run != first:
            other = run.read_config()
            if other and other.run.name == config.run.name and _same(other, config):
                return run
    if kept is None:
        return first
    numbered = (RunFolder(output / f"{name}-{number}") for number in count(2))
    return next(run for run in numbered if not run.config.exists())


def holds(folder: RunFolder, config: Config) -> bool:
    """Whether a run was started with this configuration, as far as results go."""
    kept = folder.read_config()
    return kept is not None and _same(kept, config)


def prepare(folder: RunFolder, config: Config) -> None:
    """Make a run's folder and keep the configuration in it.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        with clear_disk_errors("the run's folder", folder.path.parent):
            folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the run's folder {folder.path} cannot be made: {error.strerror}. "
            "Choose another place with run.output."
        ) from error
    write_text(folder.config, to_yaml(absolute_paths(config)))


def absolute_paths(config: Config, root: Path | None = None) -> Config:
    """The same configuration with paths that mean the same in every process and folder.

    Args:
        config: with paths that are absolute or relative to ``root``.
        root: a folder; the working directory by default.
    """
    base = root or Path.cwd()
    return _with_paths(config, lambda path: base / path)


def _placeless(config: Config) -> Config:
    return _with_paths(config, lambda path: Path(path.name))


def _with_paths(section: AnySection, change: Callable[[Path], Path]) -> AnySection:
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changes[name] = change(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(change(x) if isinstance(x, Path) else x for x in value)
        elif isinstance(value, Section):
            changes[name] = _with_paths(value, change)
    return section.model_copy(update=changes)


def find_run(name: str, output: Path) -> RunFolder:
    """The run that is called ``name``: a folder, or the beginning of its name in ``output``.

    Raises:
        UserError: no run or several runs fit; the text lists them.
    """
    return RunFolder(find_folder(name, output, CONFIG_FILE, "run"))


def output_of(overrides: Sequence[str]) -> Path:
    """The folder of runs, where there is no recipe: the overrides', else the usual one.

    Raises:
        ConfigError: ``run.output`` is no path.
    """
    own = [each for each in overrides if each.partition("=")[0].strip() == "run.output"]
    tree, problems = apply_overrides({}, own)
    if problems:
        raise ConfigError("--set", problems)
    try:
        return RunConfig.model_validate_json(json.dumps(tree.get("run", {}))).output
    except ValidationError as error:
        raise ConfigError("--set", problems_of(error, RunConfig)) from error


def find_folder(name: str, output: Path, marker: str, kind: str) -> Path:
    """The one folder that is called ``name``, absolute.

    Args:
        name: a path, or the beginning of the folder's name in ``output``.
        output: the folder that holds them.
        marker: the file that every such folder has.
        kind: what error texts call it: ``run``, ``sweep``.

    Raises:
        UserError: none or several fit; the text lists them.
    """
    if (Path(name) / marker).is_file():
        return Path(name).absolute()
    known = sorted(file.parent for file in output.glob(f"*/{marker}"))
    fitting = with_prefix(name, known)
    if len(fitting) == 1:
        return fitting[0].absolute()
    if fitting:
        listed = _listed(fitting)
        raise UserError(f"'{name}' fits {len(fitting)} {kind}s in {output}; say which:{listed}")
    if not known:
        raise UserError(
            f"no {kind} '{name}': there are no {kind}s in {output.absolute()}. "
            "Point --set run.output=FOLDER at the folder that holds it."
        )
    raise UserError(f"no {kind} '{name}' in {output}. There are:{_listed(known)}")


def with_prefix(name: str, folders: Sequence[Path]) -> list[Path]:
    """The folder of that name, else those of runs of that name, else all that begin with it."""
    called = folders_called(name)
    exact = [folder for folder in folders if folder.name == name]
    of_runs = [folder for folder in folders if called.fullmatch(folder.name)]
    return exact or of_runs or [folder for folder in folders if folder.name.startswith(name)]


def folders_called(name: str) -> re.Pattern[str]:
    """Matches the names of folders of runs of a name: a digest follows, and perhaps a number."""
    return re.compile(re.escape(name) + "-[0-9a-f]{8,}(-[0-9]+)?")


def _listed(folders: Sequence[Path]) -> str:
    names = [f"\n  {folder.name}" for folder in folders[:SHOWN_RUNS]]
    more = len(folders) - len(names)
    return "".join(names) + (f"\n  and {more} more" if more > 0 else "")


def resumed_config(folder: RunFolder, overrides: list[str]) -> Config:
    """The configuration to continue with, read from the run's folder.

    Args:
        folder: the run.
        overrides: ``a.b=c`` texts; only what cannot change results (cluster, tracking, ...).

    Raises:
        UserError: an override would change the run's results.
    """
    try:
        kept = load_config(folder.config)
    except ConfigError as error:
        raise UserError(
            f"{error}\nThe run cannot be resumed by its name; the command that began it resumes it "
            f"and writes {CONFIG_FILE} anew."
        ) from error
    config = load_config(folder.config, overrides)
    ensure_same_recipe(folder, kept, config)
    return config


def ensure_same_recipe(folder: RunFolder, kept: Config, config: Config) -> None:
    """Refuse to continue a run under a configuration that gives other results.

    Args:
        folder: the run.
        kept: what it was started with.
        config: what is wanted now.

    Raises:
        UserError: naming the keys that differ.
    """
    if _same(kept, config):
        return
    before, now = (_values(plain_tree(absolute_paths(each))) for each in (kept, config))
    changes = [
        f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    raise UserError(
        f"the run {folder.path.name} was started with another configuration and cannot be "
        f"resumed with this one:{''.join(changes)}\n"
        "Give the run another name (run.name) to start a run of its own."
    )


def _same(kept: Config, config: Config) -> bool:
    return config_digest(absolute_paths(kept)) == config_digest(absolute_paths(config))


def _values(tree: Tree, at: str = "") -> dict[str, object]:
    """Dotted key -> value, of the keys that change results."""
    found = dict[str, object]()
    for key, value in tree.items():
        if not at and key in SECTIONS_WITHOUT_INFLUENCE:
            continue
        if isinstance(value, dict):
            found |= _values(value, f"{at}{key}.")
        elif key not in WITHOUT_INFLUENCE.get(at.removesuffix("."), ()):
            found[f"{at}{key}"] = value
    return found
