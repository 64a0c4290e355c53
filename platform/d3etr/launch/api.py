"""Launch a run from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d3etr.config.arguments import require_choice
from d3etr.config.tree import Config
from d3etr.engine.find_run import folder_of
from d3etr.engine.preflight import judge_beginning
from d3etr.engine.provenance import ensure_inputs_answer
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.driver import Launcher, OpenTracker, RunResult, Status, Tracker, drive
from d3etr.launch.progress_reporter import open_display
from d3etr.launch.ray_environment import ensure_lasting, joined_address
from d3etr.launch.resources import demand_of, ensure_room, this_machine
from d3etr.launch.task import Task, train
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
    task: Task = train,
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
        from d3etr.launch.torchrun import join_rank_0, torchrun_rank

        if torchrun_rank() != 0:
            join_rank_0(config, folder, task)
            return RunResult(folder.path, folder.result() or {}, folder.weights, None, True)
    if folder.result() is None and task is train:  # others need less than training does
        ensure_can_begin(config, launcher)
    if hooks:
        task = partial(train, hooks=tuple(hooks))
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


def _launcher(name: LauncherName, task: Task) -> Launcher:
    """The launcher of that name; only its own dependencies are imported."""
    if name == "ray":
        from d3etr.launch.ray_train import RayLauncher

        return RayLauncher(task)
    if name == "local":
        from d3etr.launch.local import LocalLauncher

        return LocalLauncher(task)
    from d3etr.launch.torchrun import TorchrunLauncher

    return TorchrunLauncher(task)


def _mlflow(config: Config) -> OpenTracker | None:
    """Tracking in MLflow, where it is enabled."""
    if not config.tracking.enabled:
        return None

    def start(config: Config, run_dir: Path) -> Tracker:
        tracked = _complete_run(config, RunFolder(run_dir))
        if tracked is not None:
            return tracked
        # Slow to import, and not needed for a run that MLflow has all of.
        from d3etr.tracking.runs import open_tracker

        return open_tracker(config, run_dir)

    if find_spec("mlflow") is None:
        raise UserError(
            "tracking.enabled is true, but mlflow is not installed: pip install mlflow, or "
            "--set tracking.enabled=false"
        )
    return start


@dataclass(frozen=True)
class CompleteRun:
    """The tracker of a run that MLflow has all of."""

    run_id: str

    def finish(self, status: Status, on_progress: OnProgress = no_progress, /) -> str | None:
        """Nothing is missing."""
        return None


def _complete_run(config: Config, folder: RunFolder) -> CompleteRun | None:
    """The MLflow run of a finished run, if it has everything and is where it should be."""
    state = None if folder.result() is None else read_state(folder.path)
    if state is None or not state.complete:
        return None
    wanted = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    elsewhere = wanted and bare_url(wanted) != state.tracking_uri
    return None if elsewhere else CompleteRun(state.run_id)
