"""Ray breaks at the very end: results are complete, and the command's code is right."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml

from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.launch.api import launch
from d3etr.launch.ray_environment import package_environment

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]
PROGRAM = """
import os, signal, sys
import ray, ray.train.torch
from ray import tune
import d3etr.cli

def abort(*arguments, **settings):
    os.abort()

def lose_the_head(kind):
    true_fit = kind.fit
    def fit(self):
        true_fit(self)
        for processes in ray._private.worker._global_node.all_processes.values():
            for process in processes:
                os.kill(process.process.pid, signal.SIGKILL)
        raise ConnectionError("the head is gone")
    kind.fit = fit

ray.shutdown = ray._private.worker.shutdown = abort
lose_the_head(ray.train.torch.TorchTrainer)
lose_the_head(tune.Tuner)
d3etr.cli.program(sys.argv[1:])
"""


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command whose Ray loses its head at the end, and whose disconnecting would abort it."""
    settings = os.environ | package_environment() | {"RAY_ADDRESS": "local"}
    line = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(line, env=settings, capture_output=True, text=True, timeout=300)


def test_a_run_that_is_finished_is_a_success(make_config: MakeConfig, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(make_config("tracking.enabled=true", "tracking.figures=false")))
    done = ended("train", str(recipe), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["trained"] and result["metrics"]["steps"] == 18
    assert run_status(tmp_path, result["mlflow_run"]) == "FINISHED"
    assert not (Path(result["run_dir"]) / "lock").exists()
    assert "did not end well: " in done.stderr


def test_a_sweep_whose_trials_are_finished_is_a_success(
    recipe: Path, scenes: Path, tmp_path: Path
) -> None:
    sets = [f"run.output={tmp_path / 'runs'}", f"data.digit_scenes.root={scenes}"]
    sets += ["tracking.enabled=true", "tracking.figures=false", "optimisation.epochs=1"]
    space = {"optimisation.learning_rate": {"grid": [1e-3, 1e-4]}}
    tree = {"name": "tried", "recipe": str(recipe), "set": sets, "space": space}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    done = ended("sweep", str(tmp_path / "sweep.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "finished"]
    (folder,) = (tmp_path / "runs").glob("tried-*")
    assert {"table.md", "results.json", "best.yaml"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "lock").exists()
    state = json.loads((folder / "mlflow_run.json").read_text())
    assert run_status(tmp_path, state["run_id"]) == "FINISHED"
    assert "did not end well: " in done.stderr


def run_status(folder: Path, run_id: str) -> str:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    return str(client.get_run(run_id).info.status)


def test_from_python_a_shutdown_that_fails_is_a_warning(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutdown = ray.shutdown

    def broken() -> None:
        shutdown()
        raise ConnectionError("no head")

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "shutdown", broken)
    result = launch(make_config("optimisation.epochs=1"), quiet=True)
    assert result.metrics["steps"] == 6
    assert "Ray did not end in order: ConnectionError('no head')" in caplog.text
    assert not ray.is_initialized()
