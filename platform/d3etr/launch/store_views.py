"""Makes the store of a run's teacher views without training: here, or by Ray's workers."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from d3etr.config.load import config_digest
from d3etr.config.tree import Config
from d3etr.engine.distributed import TrainContext
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import RunFailedError, UserError
from d3etr.files import read_json, write_text
from d3etr.launch.api import LauncherName, ensure_can_begin
from d3etr.launch.display import JournalFollower, open_display
from d3etr.launch.driver import Launch
from d3etr.launch.limits import clear_limits
from d3etr.launch.lock import RunLock
from d3etr.launch.process import terminable
from d3etr.launch.processes import local_launcher

RESULT = "store.json"


def store_views(config: Config, launcher: LauncherName, *, quiet: bool) -> dict[str, Any]:
    """Store what a run's teacher says about its training images, with and without labels.

    Args:
        config: of a run with ``teacher.views``.
        launcher: ``local``, or ``ray``: ``cluster.workers`` workers share the store's parts.
        quiet: show no progress.

    Returns:
        See ``engine.views.store_only``.

    Raises:
        UserError: the run stores no views, or see ``engine/views.py``.
        RunFailedError: no worker came to an end.
    """
    if config.teacher is None or config.teacher.views is None:
        raise UserError(
            "the recipe stores no teacher views: expected teacher.views, for example --set "
            "teacher.views.count=8"
        )
    ensure_can_begin(config, launcher)
    config = absolute_paths(config)
    folder = RunFolder(config.run.output / "teacher-views" / f"making-{config_digest(config)}")
    folder.path.mkdir(parents=True, exist_ok=True)
    display, lock = open_display(quiet), RunLock(folder.path)
    follower = JournalFollower(folder.journal, display)
    try:
        with terminable(), lock, ExitStack() as later:
            launch = Launch(config, folder.path, lock.owner.token, display.on_progress, later)
            follower.start()
            later.callback(follower.stop)
            _ready(launch, launcher)()
    finally:
        display.close()
    try:
        found = read_json(folder.path / RESULT)
    except FileNotFoundError:
        raise RunFailedError("storing teacher views ended without a result") from None
    shutil.rmtree(folder.path, ignore_errors=True)
    return found


def _ready(launch: Launch, launcher: LauncherName) -> Any:
    if launcher == "local":
        return local_launcher(_work)(launch)
    from d3etr.launch.ray_train import ray_launcher  # imports Ray

    return ray_launcher(_work)(launch)


def _work(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
    """What each worker does."""
    from d3etr.engine.views import store_only  # the driver needs no models

    with clear_limits():
        found = store_only(config, run_dir, context)
    if context.rank == 0:
        write_text(run_dir / RESULT, json.dumps(found) + "\n")
    return {}
