"""Launch a run from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d3etr.config.arguments import require_choice, require_flag, require_path
from d3etr.config.load import load_config
from d3etr.config.overrides import as_overrides
from d3etr.config.tree import Config
from d3etr.engine.find_run import folder_of
from d3etr.engine.preflight import judge_beginning
from d3etr.engine.provenance import ensure_inputs_answer
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch import processes
from d3etr.launch.display import open_display
from d3etr.launch.driver import Launcher, OpenTracker, RunResult, Status, Tracker, drive
from d3etr.launch.processes import (
    Task,
    join_rank_0,
    local_launcher,
    torchrun_launcher,
    torchrun_rank,
)
from d3etr.launch.ray_environment import ensure_lasting, joined_address
from d3etr.launch.resources import demand_of, ensure_room, this_machine
from d3etr.progress import OnProgress, no_progress
from d3etr.text import bare_url
from d3etr.tracking.state import read_state

if TYPE_CHECKING:
    from d3etr.engine.hooks import Hook

LauncherName = Literal["ray", "local", "torchrun"]
LAUNCHERS: tuple[LauncherName, ...] = ("ray", "local", "torchrun")


def launch(
    config: Config,
    *,
    launcher: LauncherName = "ray",
    resume: bool = False,
    run_dir: Path | None = None,
    quiet: bool = False,
    task: Task = processes.train,
    hooks: Sequence[Hook] = (),
    open_tracker: OpenTracker | None = None,
) -> RunResult:
    """Train a configuration: start its run, resume it, or return its result.

    The run's folder follows from the configuration, so the same call goes on where an earlier
    one stopped, and returns at once where it finished.

    Args:
        config: the run.
        launcher: ``ray`` (Ray Train), ``local`` (this process) or ``torchrun`` (this is one of
            its workers).
        resume: refuse to start afresh.
        run_dir: a folder found by name, instead of the one that follows from ``config``.
        quiet: show no progress.
        task: what each worker runs.
        hooks: people's own code, called on the first worker; workers of other processes get
            copies of them.
        open_tracker: starts tracking; by default MLflow, where ``tracking.enabled``.

    Returns:
        The finished run. Under torchrun, workers other than rank 0 return when they are done,
        with what rank 0 wrote.

    Raises:
        UserError: something that the user can fix.
        RunFailedError: training broke.
        RunInterrupted: Ctrl-C or a termination signal; the same call goes on with the run.
    """
    require_choice("launcher", launcher, LAUNCHERS)
    folder = folder_of(config) if run_dir is None else RunFolder(run_dir.absolute())
    if resume and not folder.config.exists():
        raise UserError(
            f"nothing to resume: there is no run {folder.path.name} in {folder.path.parent}"
        )
    if launcher == "torchrun":
        if torchrun_rank() != 0:
            join_rank_0(config, folder, task)
            return RunResult(folder.path, folder.result() or {}, folder.weights, None, True)
    if folder.result() is None and task is processes.train:  # others need less than training does
        ensure_can_begin(config, launcher)
    if hooks:
        task = partial(processes.train, hooks=tuple(hooks))
    return drive(
        config,
        folder,
        _launcher(launcher, task),
        display=open_display(quiet),
        open_tracker=open_tracker or _mlflow(config),
    )


def ensure_can_begin(config: Config, launcher: LauncherName) -> None:
    """Refuse what can be known to fail before anything is started, here and in a dry run.

    Of a cluster that is joined, nothing is known here: files may be on its machines only.

    Raises:
        UserError: naming what is missing, and where.
    """
    ensure_lasting(config)
    if launcher == "ray" and joined_address(config.cluster) is not None:
        ensure_inputs_answer([config])
        return
    judge_beginning(config)
    if launcher == "ray":
        nodes = [this_machine()]
        ensure_room(demand_of(config.cluster, nodes), nodes)


def train(
    recipe: str | Path,
    *,
    launcher: LauncherName = "ray",
    quiet: bool = False,
    hooks: Sequence[Hook] = (),
    **overrides: Any,
) -> RunResult:
    """Train a recipe; a run that is finished already is returned as it is.

    Args:
        recipe: a YAML file, or the name of a shipped recipe, such as ``digits/d3etr``.
        launcher: ``ray`` (Ray Train) or ``local`` (this process).
        quiet: show no progress.
        hooks: objects of ``d3etr.engine.hooks.Hook``, called at steps, evaluations and the end.
        **overrides: sections of the configuration, such as ``optimisation={"epochs": 12}`` or
            ``**{"data.workers": 2}``; they win over the recipe.

    Returns:
        The run's folder, final metrics and weights.

    Raises:
        UserError: something that the caller can fix.
    """
    require_flag("quiet", quiet)
    config = load_config(require_path("recipe", recipe), as_overrides(overrides))
    return launch(config, launcher=launcher, quiet=quiet, hooks=hooks)


def _launcher(name: LauncherName, task: Task) -> Launcher:
    if name == "ray":
        from d3etr.launch.ray_train import ray_launcher  # imports Ray

        return ray_launcher(task)
    return local_launcher(task) if name == "local" else torchrun_launcher(task)


def _mlflow(config: Config) -> OpenTracker | None:
    """Tracking in MLflow, where it is enabled."""
    if not config.tracking.enabled:
        return None

    if find_spec("mlflow") is None:
        raise UserError(
            "tracking.enabled is true, but mlflow is not installed: pip install mlflow, or "
            "--set tracking.enabled=false"
        )

    def start(config: Config, run_dir: Path) -> Tracker:
        """Track a run, unless it is finished and MLflow has all of it: that needs no MLflow."""
        state = None if RunFolder(run_dir).result() is None else read_state(run_dir)
        wanted = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if state is not None and state.complete:
            here = not wanted or bare_url(wanted) == state.tracking_uri
            if here and state.is_registered(config.tracking.register_as):
                return CompleteRun(state.run_id)
        from d3etr.tracking.runs import open_tracker  # slow to import

        return open_tracker(config, run_dir)

    return start


@dataclass(frozen=True)
class CompleteRun:
    """The tracker of a run that MLflow has all of."""

    run_id: str

    def finish(self, status: Status, on_progress: OnProgress = no_progress, /) -> str | None:
        """Nothing is missing."""
        return None
