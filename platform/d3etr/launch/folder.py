"""A run's folder: what it is called, what is in it, how it is found again by name."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

from d3etr.config.base import Section
from d3etr.config.load import (
    SECTIONS_WITHOUT_INFLUENCE,
    WITHOUT_INFLUENCE,
    config_digest,
    load_config,
    plain_tree,
    to_yaml,
)
from d3etr.config.overrides import Tree
from d3etr.config.problems import ConfigError
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.training.storage import clear_disk_errors, write_text
from d3etr.training.summary import SUMMARY_FILE, WEIGHTS_FILE, numbers, read_summary

logger = get_logger(__name__)

AnySection = TypeVar("AnySection", bound=Section)

CONFIG_FILE = "config.yaml"
DIGEST_PATTERN = "-[0-9a-f]{8}(-[0-9]+)?"
"""What follows a run's name in its folder's."""
SHOWN_RUNS = 10
"""So many runs are listed where a name does not fit one."""


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, with absolute paths."""
        return self.path / CONFIG_FILE

    @property
    def journal(self) -> Path:
        """The journal that rank 0 writes."""
        return self.path / "journal.jsonl"

    @property
    def summary(self) -> Path:
        """The final metrics; there once the run is finished."""
        return self.path / SUMMARY_FILE

    @property
    def weights(self) -> Path:
        """The trained student."""
        return self.path / WEIGHTS_FILE

    def result(self) -> dict[str, float] | None:
        """Final metrics of a finished run, None of any other; see ``read_summary``."""
        summary = read_summary(self.path)
        return None if summary is None else numbers(summary)

    def kept_config(self) -> Config | None:
        """What the run was begun with; None where there is no run.

        None also, with a warning, where the file is damaged.
        """
        if not self.config.exists():
            return None
        try:
            return load_config(self.config)
        except ConfigError as error:
            logger.warning("%s; its run counts as the one that its name says", error)
            return None

    def holds(self, config: Config) -> bool:
        """Whether the run was begun with this configuration, as far as results go."""
        kept = self.kept_config()
        return kept is not None and _same(kept, config)

    def prepare(self, config: Config) -> None:
        """Make the folder and keep the configuration in it.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            with clear_disk_errors("the run's folder", self.path.parent):
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run's folder {self.path} cannot be made: {error.strerror}. "
                "Choose another place with run.output."
            ) from error
        write_text(self.config, to_yaml(absolute_paths(config)))


def folder_of(config: Config) -> RunFolder:
    """The folder of a configuration's run: the one that it was begun in, or a new one.

    Its name holds a digest that leaves defaults out. Whose run it is, the configuration in it
    says, which has every value: to another version of d3etr defaults may be others, and keys may
    have other names. A key that has been added since has its default.
    """
    name = f"{config.run.name}-{config_digest(config)}"
    first = RunFolder((config.run.output / name).absolute())
    kept = first.kept_config()
    # Other places with the same content are the same run, and other content is noticed.
    if kept is not None and config_digest(_placeless(kept)) == config_digest(_placeless(config)):
        return first
    for run in _runs_called(config.run.name, first.path.parent):
        if run != first and run.holds(config):
            return run
    return first if kept is None else _next_free(first)


def _runs_called(name: str, output: Path) -> list[RunFolder]:
    begun = output.glob(f"{glob.escape(name)}-*/{CONFIG_FILE}")
    pattern = re.compile(re.escape(name) + DIGEST_PATTERN)
    return [RunFolder(file.parent) for file in sorted(begun) if pattern.fullmatch(file.parent.name)]


def _next_free(first: RunFolder) -> RunFolder:
    numbered = (RunFolder(first.path.with_name(f"{first.path.name}-{n}")) for n in count(2))
    return next(folder for folder in numbered if not folder.config.exists())


def absolute_paths(config: Config, root: Path | None = None) -> Config:
    """The same configuration with paths that mean the same in every process and folder.

    Args:
        config: with paths that are absolute or relative to ``root``.
        root: a folder; the working directory by default.
    """
    base = root or Path.cwd()
    return _with_paths(config, lambda path: base / path.expanduser())


def _placeless(config: Config) -> Config:
    return _with_paths(config, lambda path: Path(path.name))


def _with_paths(section: AnySection, change: Callable[[Path], Path]) -> AnySection:
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changes[name] = change(value)
        elif isinstance(value, Section):
            changes[name] = _with_paths(value, change)
    return section.model_copy(update=changes)


def find_run(name: str, output: Path) -> RunFolder:
    """The run that is called ``name``: a folder, or the beginning of its name in ``output``.

    Raises:
        UserError: no run or several runs fit; the text lists them.
    """
    given = Path(name)
    if (given / CONFIG_FILE).is_file():
        return RunFolder(given.absolute())
    runs = sorted(file.parent for file in output.glob(f"*/{CONFIG_FILE}"))
    fitting = [run for run in runs if run.name == name] or [
        run for run in runs if run.name.startswith(name)
    ]
    if len(fitting) == 1:
        return RunFolder(fitting[0].absolute())
    raise UserError(_not_one(name, output, fitting, runs))


def _not_one(name: str, output: Path, fitting: list[Path], runs: list[Path]) -> str:
    if fitting:
        return f"'{name}' fits {len(fitting)} runs in {output}; say which:{_listed(fitting)}"
    if not runs:
        return (
            f"no run '{name}': there are no runs in {output.absolute()}. "
            "Point --set run.output=FOLDER at the folder that holds it."
        )
    close = difflib.get_close_matches(name, [run.name for run in runs], n=3, cutoff=0.4)
    shown = [output / match for match in close] or runs
    return f"no run '{name}' in {output}. There are:{_listed(shown)}"


def _listed(runs: list[Path]) -> str:
    names = [f"\n  {run.name}" for run in runs[:SHOWN_RUNS]]
    more = len(runs) - len(names)
    return "".join(names) + (f"\n  and {more} more" if more > 0 else "")


def resumed_config(folder: RunFolder, overrides: list[str]) -> Config:
    """The configuration to go on with, read from the run's folder.

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
    """Refuse to go on with a run under a configuration that gives other results.

    Args:
        folder: the run.
        kept: what it was started with.
        config: what is asked for now.

    Raises:
        UserError: naming the keys that differ.
    """
    if _same(kept, config):
        return
    before, now = absolute_paths(kept), absolute_paths(config)
    changes = [
        f"\n  {key}: {old!r} there, {new!r} now"
        for key, old, new in _differences(plain_tree(before), plain_tree(now))
        if _has_influence(key)
    ]
    raise UserError(
        f"the run {folder.path.name} was started with another configuration and cannot be "
        f"resumed with this one:{''.join(changes)}\n"
        "Give the run another name (run.name) to start a run of its own."
    )


def _same(kept: Config, config: Config) -> bool:
    return config_digest(absolute_paths(kept)) == config_digest(absolute_paths(config))


def _has_influence(path: str) -> bool:
    section, key = f"{path}.".split(".")[:2]
    return section not in SECTIONS_WITHOUT_INFLUENCE and key not in WITHOUT_INFLUENCE.get(
        section, frozenset()
    )


def _differences(before: Tree, now: Tree, at: str = "") -> list[tuple[str, object, object]]:
    found: list[tuple[str, object, object]] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{at}{key}.")
        elif old != new:
            found.append((f"{at}{key}", old, new))
    return found
