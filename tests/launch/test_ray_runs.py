"""Real Ray runs on tiny digit scenes. One local cluster of two CPUs serves all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import ray.cloudpickle
import ray.util
import sabotage

from d3etr.config.infrastructure import ClusterConfig
from d3etr.config.load import load_config, to_yaml
from d3etr.config.tree import Config
from d3etr.engine.journal import read_journal
from d3etr.errors import UserError
from d3etr.launch.api import launch
from d3etr.launch.driver import RunFailedError, RunResult
from d3etr.launch.ray_cluster import connected
from d3etr.launch.ray_environment import environment, package_environment

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]


class Recorder:
    """A tracker that remembers."""

    run_id = "recorded"

    def __init__(self) -> None:
        self.status: str | None = None

    def finish(self, status: str, stage: object = None) -> str | None:
        self.status = status
        return None


def steps(run_dir: Path, kind: str) -> list[int]:
    """Of the journal's records of a kind."""
    journal = read_journal(run_dir / "journal.jsonl")
    return [record["step"] for record in journal if record["kind"] == kind]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sabotage)
    with environment({"RAY_ADDRESS": "local"}), connected(ClusterConfig(), lambda text: None):
        yield


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The tiny run in one process."""
    output = tmp_path_factory.mktemp("local")
    config = load_config(recipe, [f"run.output={output}", f"data.digit_scenes.root={scenes}"])
    return launch(config, launcher="local", quiet=True)


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step; a step that is twice in the journal fails."""
    records = [r for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "step"]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    return {record["step"]: record["metrics"]["train/loss"] for record in records}


def attempts(run_dir: Path) -> int:
    return len(list(run_dir.glob("attempt-*")))


def test_two_workers_of_which_one_is_killed_in_an_epoch_change_nothing_in_the_result(
    cluster: None, undisturbed: RunResult, make_config: MakeConfig
) -> None:
    recorder = Recorder()
    result = launch(
        make_config("cluster.workers=2"),
        task=sabotage.train_and_kill,
        open_tracker=lambda config, run_dir: recorder,
        quiet=True,
    )
    assert (result.run_dir / "killed").exists()
    assert len(steps(result.run_dir, "start")) == 2
    assert steps(result.run_dir, "step") == list(range(1, 19))
    assert steps(result.run_dir, "evaluation") == [6, 12, 18]
    assert recorder.status == "FINISHED"
    # One worker under Ray: test_a_killed_drivers_run_is_finished_by_the_same_command.
    assert len(losses(result.run_dir)) == 18
    assert losses(result.run_dir) == pytest.approx(losses(undisturbed.run_dir), rel=1e-4)
    assert result.metrics["mAP"] == pytest.approx(undisturbed.metrics["mAP"], abs=1e-4)
    assert result.metrics["train/loss"] == pytest.approx(
        undisturbed.metrics["train/loss"], rel=1e-4
    )


def test_a_mistake_on_one_worker_is_one_text_and_is_not_tried_again(
    cluster: None, make_config: MakeConfig
) -> None:
    config = make_config("cluster.workers=2", "run.name=mistake")
    with pytest.raises(UserError) as caught:
        launch(config, task=sabotage.mistake_on_one_worker, quiet=True)
    assert str(caught.value) == "image 17 is truncated"
    (run_dir,) = config.run.output.glob("mistake-*")
    assert attempts(run_dir) == 2
    assert not (run_dir / "lock").exists()


def test_a_bug_that_comes_back_ends_the_run_with_its_traceback(
    cluster: None, make_config: MakeConfig
) -> None:
    config = make_config("cluster.maximum_failures=5", "run.name=bug")
    with pytest.raises(RunFailedError, match="twice in the same way") as caught:
        launch(config, task=sabotage.bug, quiet=True)
    assert 'raise ZeroDivisionError("a bug")' in str(caught.value)
    assert "site-packages/ray" not in str(caught.value)
    (run_dir,) = config.run.output.glob("bug-*")
    assert attempts(run_dir) == 2


def test_more_gpus_than_there_are_is_said_at_once(cluster: None, make_config: MakeConfig) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"and 0 GPUs on 1 node: 1 worker with 1 CPU and 2 GPUs"):
        launch(make_config("cluster.gpus_per_worker=2"), quiet=True)
    assert time.monotonic() - begun < 15


def test_a_cluster_that_does_not_answer_is_one_clear_error(
    make_config: MakeConfig, repository: Path
) -> None:
    ended = subprocess.run(
        command(repository, make_config("cluster.address=127.0.0.1:1")),
        env=os.environ | package_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "the Ray cluster at 127.0.0.1:1 cannot be used" in ended.stderr
    assert "Connection refused" in ended.stderr and "Traceback" not in ended.stderr


def test_waiting_for_a_cluster_that_takes_connections_but_says_nothing_has_an_end(
    make_config: MakeConfig, repository: Path
) -> None:
    shorter = (
        "import sys, d3etr.cli, d3etr.launch.ray_cluster as ray_cluster\n"
        "ray_cluster.CONNECT_SECONDS = 3.0\n"
        "d3etr.cli.program(['train', sys.argv[1]])"
    )
    with socket.create_server((ray.util.get_node_ip_address(), 0)) as silent:
        host, port = silent.getsockname()
        recipe = command(repository, make_config(f"cluster.address={host}:{port}"))[-1]
        ended = subprocess.run(
            [sys.executable, "-c", shorter, recipe],
            env=os.environ | package_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ended.returncode == 2
    assert f"{host}:{port} cannot be used: no answer within 3 seconds" in ended.stderr
    assert "Traceback" not in ended.stderr


def command(repository: Path, config: Config, *arguments: str) -> list[str]:
    """The command line that trains ``config``."""
    config.run.output.mkdir(parents=True, exist_ok=True)
    recipe = config.run.output / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    return [sys.executable, str(repository / "trainers" / "run.py"), str(recipe), *arguments]


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_killed_drivers_run_is_finished_by_the_same_command(
    undisturbed: RunResult, make_config: MakeConfig, launcher: str, repository: Path
) -> None:
    config = make_config()
    line = command(repository, config, "--launcher", launcher)
    settings = os.environ | package_environment() | {"RAY_ADDRESS": "local"}
    with subprocess.Popen(line, env=settings, stderr=subprocess.DEVNULL) as driver:
        journal = wait_for_step(config, 9)
        driver.send_signal(signal.SIGKILL)
    again = subprocess.run(line, env=settings, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "took over" in again.stderr
    # Ray's workers outlive their driver for some seconds and may even finish so short a run.
    assert "going on from" in again.stderr or launcher == "ray"
    run_dir = journal.parent
    # Not to the last digit: another process may add up in another order.
    assert losses(run_dir) == pytest.approx(losses(undisturbed.run_dir), rel=1e-6)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["train/loss"] == pytest.approx(undisturbed.metrics["train/loss"], rel=1e-6)


def wait_for_step(config: Config, step: int) -> Path:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for journal in config.run.output.glob("*/journal.jsonl"):
            # A checkpoint is written beside the training: it may come after later steps.
            saved = list(journal.parent.glob("checkpoints/step-*"))
            if saved and any(record["step"] >= step for record in read_journal(journal)):
                return journal
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within two minutes")
