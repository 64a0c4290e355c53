"""A sweep as every process of it sees it: what each trial trains, and in which folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d3etr.config.load import config_digest, read_recipe, validate
from d3etr.config.overrides import Tree, as_overrides
from d3etr.config.problems import ConfigError, Problem
from d3etr.config.sweep import SweepConfig
from d3etr.config.tree import Config
from d3etr.engine.find_run import absolute_paths, folder_of, holds
from d3etr.engine.provenance import Inputs
from d3etr.engine.run_folder import SUMMARY_FILE, RunFolder
from d3etr.errors import UserError
from d3etr.launch.sweeps.trials import NUMBER, POINT, Trial, planned_trials, random_points
from d3etr.logs import get_logger
from d3etr.tracking.address import embedded_uri

logger = get_logger(__name__)

CHECKED_POINTS = 50
"""So many random points of a space that is searched are validated before anything starts."""
MOST_COUNTED = 1000
"""An earlier version's search of at most so many trials is found: its number was in the name."""
NOT_SWEPT = ("run", "cluster", "tracking")
SWEEP_FILE = "sweep.yaml"
"""In a sweep's folder, the sweep itself."""


@dataclass(frozen=True)
class Plan:
    """What trials need to know, wherever they run.

    Attributes:
        sweep: the configuration.
        trees: the recipes by their path, read where the sweep was started.
        root: working directory of the driver, which relative paths in recipes mean.
        folder: of the sweep, absolute, on storage that all nodes share.
        trials: every trial; empty where a search proposes them.
        tracking_uri: the SQLite file of sweep and trials, where no other MLflow is named.
    """

    sweep: SweepConfig
    trees: Mapping[Path, Tree]
    root: Path
    folder: Path
    trials: tuple[Trial, ...]
    tracking_uri: str | None = None

    @property
    def searched(self) -> bool:
        """Whether trials are proposed one after the other instead of planned."""
        return self.sweep.search.method == "optuna"

    @property
    def base(self) -> Config:
        """The recipe without any trial's values: what holds for the sweep as a whole."""
        sweep = self.sweep
        config = validate(self.trees[sweep.recipe], str(sweep.recipe), sweep.set)
        return absolute_paths(config, self.root)

    def trial(self, parameters: Mapping[str, Any]) -> Trial:
        """The trial that Tune gave ``parameters`` to: its number, and its point if proposed."""
        number = int(parameters[NUMBER])
        if self.trials:
            return self.trials[number]
        return Trial(number, dict(parameters[POINT]), self.sweep.seeds[0])

    def examples(self) -> Sequence[Trial]:
        """Every planned trial, or ``CHECKED_POINTS`` random ones of a space that is searched."""
        if self.trials:
            return self.trials
        points = random_points(self.sweep, CHECKED_POINTS)
        return [Trial(number, point, self.sweep.seeds[0]) for number, point in enumerate(points)]

    def config(self, trial: Trial) -> Config:
        """What a trial trains, in a folder below the sweep's.

        Paths are as the recipe has them, so that the run's digest is that of the same run
        outside of a sweep; ``placed`` makes them absolute.

        Raises:
            ConfigError: the combination is not valid.
        """
        recipe, name = trial.recipe(self.sweep), trial.name(self.sweep)
        place = {"run.name": name, "run.output": str(self.folder)}
        if self.tracking_uri is not None:
            place["tracking.uri"] = self.tracking_uri
        try:
            return validate(
                self.trees[recipe],
                str(recipe),
                (*trial.overrides(self.sweep), *as_overrides(place)),
            )
        except ConfigError as error:
            title = trial.title(self.sweep)
            raise ConfigError(f"{error.source}, trial '{title}'", error.problems) from error

    def placed(self, config: Config) -> Config:
        """The same with paths that mean the same in every process and folder."""
        return absolute_paths(config, self.root)

    def finished_twin(self, config: Config, inputs: Inputs | None = None) -> Path | None:
        """A run of the same configuration that has finished, by itself or in another sweep.

        Args:
            config: of a trial.
            inputs: what runs read, looked at before.
        """
        placed, inputs = self.placed(config), inputs or Inputs()
        runs = [folder_of(config)]  # also where an earlier version's digest is in its name
        # Trials are trained, and their folders named, with paths that are absolute.
        for digest in dict.fromkeys(map(config_digest, (config, placed))):
            for pattern in (f"*-{digest}*/{SUMMARY_FILE}", f"*/*-{digest}*/{SUMMARY_FILE}"):
                found = sorted(self.folder.parent.glob(pattern))
                runs += [RunFolder(summary.parent) for summary in found]
        for run in runs:
            if run.result() is not None and holds(run, placed):
                try:
                    inputs.ensure_result_is_of(placed, run.path)
                except UserError as error:
                    logger.info("not the same run: %s", error)
                else:
                    return run.path
        return None


def make_plan(sweep: SweepConfig) -> Plan:
    """Work out a sweep and refuse it if one of its trials could not start.

    The folder's name holds a digest of the sweep and of what its recipes say.

    Raises:
        ConfigError: a planned trial's configuration is not valid; where trials are searched,
            that of one of ``CHECKED_POINTS`` random points.
    """
    for key in sweep.space:
        if key.partition(".")[0] in NOT_SWEPT:
            text = "changes where or how a run happens, not what comes out: nothing to sweep over"
            raise ConfigError(f"sweep '{sweep.name}'", [Problem(f"space.{key}", text)])
    cases = (case.recipe for case in sweep.cases.values())
    recipes = {recipe for recipe in (sweep.recipe, *cases) if recipe is not None}
    trees = {recipe: read_recipe(recipe) for recipe in recipes}
    planned = sweep.search.method != "optuna"
    trials = tuple(planned_trials(sweep)) if planned else ()
    draft = Plan(sweep, trees, Path.cwd(), Path.cwd(), trials)
    configs = [draft.config(trial) for trial in draft.examples()]
    base = draft.base
    digests = sorted({config_digest(config) for config in configs})
    folder = _folder(base.run.output, sweep, digests)
    named = base.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    embedded = base.tracking.enabled and not named
    uri = embedded_uri(base.run.output) if embedded else None
    return replace(draft, folder=folder, tracking_uri=uri)


def _folder(output: Path, sweep: SweepConfig, configs: list[str]) -> Path:
    """The folder of a sweep: named after its digest, or as an earlier version named it."""
    tree = _influential(sweep)
    if sweep.search.method != "optuna":
        return output / f"{sweep.name}-{_digest(tree, configs)}"
    counted = tree["search"]
    uncounted = {key: value for key, value in counted.items() if key != "trials"}
    # With more trials it is the same search, which goes on.
    folder = output / f"{sweep.name}-{_digest(tree | {'search': uncounted}, configs)}"
    if folder.exists() or not any(output.glob(f"{sweep.name}-*")):
        return folder
    for trials in range(min(sweep.search.trials, MOST_COUNTED), 0, -1):
        digest = _digest(tree | {"search": counted | {"trials": trials}}, configs)
        before = output / f"{sweep.name}-{digest}"
        if before.exists():
            return before
    return folder


def _digest(tree: Tree, configs: list[str]) -> str:
    content = json.dumps([tree, configs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _influential(sweep: SweepConfig) -> Tree:
    """What of a sweep decides which trials it has."""
    shown = {"title": True, "maximum_concurrent": True, "baseline": True}
    tree = sweep.model_dump(mode="json", exclude={**shown, "cases": {"__all__": {"baseline"}}})
    # A key of earlier versions: their sweeps keep their digests.
    return tree | {"search": tree["search"] | {"perturb_every_epochs": 1}}
