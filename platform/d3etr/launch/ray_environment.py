"""How Ray's processes are set up: their environment variables, and where they find d3etr."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import d3etr
from d3etr.config.infrastructure import ClusterConfig
from d3etr.config.tree import Config
from d3etr.data.images import LIMIT_VARIABLE
from d3etr.errors import UserError
from d3etr.launch.process import WAITING

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job; holds the job's runtime environment."""
SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 keeps Ray on this machine's loopback interface, also on Linux. (It is 1 there, and 0 on the
two in its name.) It is the one thing that does for all of Ray's processes."""
SQLITE = "sqlite:///"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def ray_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables for the driver's Ray; the user's own values win.

    Ray Train hands the ``RAY_TRAIN_*`` ones on to its controller and workers.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # A worker's print would appear twice in the driver's output.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Reports wait for the controller's next look; 2 seconds are long for a short epoch.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.start_timeout_seconds),
        # Workers stay in the driver's folder.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # A worker that asked for no GPU sees none.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    }


def own_cluster_settings() -> dict[str, str]:
    """Environment variables for a cluster that is started here; the user's own values win."""
    return {
        # It loses no node to others: one process less to start.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Nobody else has any business with it.
        SEVERAL_MACHINES: "0",
        # Ray's own 15 lets every other program of this machine go first.
        "RAY_worker_niceness": "0",
        WAITING[0]: WAITING[1],
    }


def own_cluster_overrides() -> dict[str, str]:
    """The same, whatever the user's values: the package's place, and no proxy in between."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    kept = [name for name in before.split(",") if name]
    exceptions = ",".join(dict.fromkeys([*kept, *LOOPBACK]))
    return package_environment() | {"no_proxy": exceptions, "NO_PROXY": exceptions}


@contextmanager
def environment(values: Mapping[str, str], *, override: bool = False) -> Iterator[None]:
    """Set variables for the time of the block.

    Args:
        values: name to value.
        override: also set those that are set already.
    """
    changed = {name: value for name, value in values.items() if override or name not in os.environ}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def package_environment() -> dict[str, str]:
    """PYTHONPATH that lets workers import d3etr; empty where it is installed.

    From a checkout, workers on this machine and on shared storage find the absolute path. A
    worker of a submitted job starts in its own copy of the working directory, where the
    relative path leads to the copy.
    """
    source = Path(d3etr.__file__).resolve().parent.parent
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    if source in installed:
        return {}
    relative = os.path.relpath(source)
    entries = [] if relative.startswith(os.pardir) else [relative]
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries += [str(source), *(entry for entry in before if entry != str(source))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(entries))}


def runtime_environment() -> dict[str, dict[str, str]]:
    """Ray's ``runtime_env`` for joining a running cluster.

    A submitted job that brings its own PYTHONPATH keeps it: Ray refuses two.
    """
    variables = package_environment()
    for name in (LIMIT_VARIABLE, WAITING[0]):  # workers decode and wait as the driver would
        if name in os.environ:
            variables[name] = os.environ[name]
    job = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    theirs = (job.get("runtime_env") or {}).get("env_vars") or {}
    kept = {name: value for name, value in variables.items() if name not in theirs}
    return {"env_vars": kept} if kept else {}


def joined_address(cluster: ClusterConfig) -> str | None:
    """The running cluster that a run joins; None where it starts one of its own."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or None


def ensure_lasting(config: Config) -> None:
    """Refuse to write results into the copy of its working directory that Ray makes for a job.

    That is on one machine only and is removed some time after the job.

    Raises:
        UserError: naming the key.
    """
    if not os.environ.get(JOB_CONFIG):
        return
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    places = {"run.output": config.run.output}
    if config.tracking.enabled and uri.startswith(SQLITE):
        places["tracking.uri"] = Path(uri.removeprefix(SQLITE))
    for key, place in places.items():
        if "working_dir_files" in place.expanduser().absolute().parts:
            raise UserError(
                f"{key}: '{place}' is inside of the temporary copy that Ray made of the job's "
                "working directory, and would be removed with it. Give an absolute path on "
                f"storage that all machines of the cluster share: --set {key}="
                f"{SQLITE if key == 'tracking.uri' else ''}/SHARED/{place.name}"
            )
