import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d3etr.config.infrastructure import ClusterConfig
from d3etr.launch.ray_environment import (
    JOB_CONFIG,
    environment,
    own_cluster_settings,
    package_environment,
    ray_settings,
    runtime_environment,
)


def test_variables_are_set_for_the_block_and_the_users_own_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("D3ETR_TEST_A", "users")
    with environment({"D3ETR_TEST_A": "ours", "D3ETR_TEST_B": "ours"}):
        assert (os.environ["D3ETR_TEST_A"], os.environ["D3ETR_TEST_B"]) == ("users", "ours")
    assert os.environ["D3ETR_TEST_A"] == "users" and "D3ETR_TEST_B" not in os.environ


def test_overriding_restores_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3ETR_TEST_A", "users")
    with environment({"D3ETR_TEST_A": "ours"}, override=True):
        assert os.environ["D3ETR_TEST_A"] == "ours"
    assert os.environ["D3ETR_TEST_A"] == "users"


def test_the_start_timeout_reaches_ray() -> None:
    settings = ray_settings(ClusterConfig(start_timeout_seconds=7.5))
    assert settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "7.5"


def test_workers_of_an_own_cluster_have_the_priority_of_other_programs() -> None:
    assert own_cluster_settings()["RAY_worker_niceness"] == "0"


def test_a_checkout_is_on_the_workers_path_wherever_they_start(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.chdir(repository)
    source = str(repository / "platform")
    assert package_environment()["PYTHONPATH"].split(os.pathsep) == [
        "platform",
        source,
        "/elsewhere",
    ]
    monkeypatch.chdir(tmp_path)
    assert package_environment()["PYTHONPATH"].split(os.pathsep) == [source, "/elsewhere"]


def test_an_installed_package_needs_no_path(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(repository / "platform")
    monkeypatch.setattr("d3etr.launch.ray_environment.sysconfig.get_path", lambda kind: source)
    assert package_environment() == {}


def test_a_jobs_own_path_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": "platform"}}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    assert runtime_environment() == {}
    monkeypatch.setenv(JOB_CONFIG, "{}")
    assert "PYTHONPATH" in runtime_environment()["env_vars"]


@pytest.mark.parametrize(
    ("name", "value"), [("D3ETR_MAXIMUM_MEGAPIXELS", "200"), ("GOMP_SPINCOUNT", "20000")]
)
def test_workers_of_a_running_cluster_have_the_drivers_limit_of_pixels_and_way_to_wait(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert name not in runtime_environment().get("env_vars", {})
    monkeypatch.setenv(name, value)
    assert runtime_environment()["env_vars"][name] == value


def test_the_script_runs_from_a_checkout_that_is_not_installed(
    repository: Path, tmp_path: Path
) -> None:
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(repository / "trainers" / "run.py"), "absent.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "absent.yaml" in ended.stderr and "Traceback" not in ended.stderr
