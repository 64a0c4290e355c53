"""A real MLflow server that goes away during a run and comes back, or does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow.tracking import MlflowClient
from tracked_folders import journal_records, write_journal

from d3etr.config.tree import Config
from d3etr.tracking.runs import open_tracker, replay
from d3etr.tracking.state import read_state

if TYPE_CHECKING:
    from conftest import Server

pytestmark = pytest.mark.slow
MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]
CANARY = "c4nary-Pass.w0rd"


def steps_at(server: Server, run_id: str) -> list[int]:
    history = MlflowClient(tracking_uri=server.uri).get_metric_history(run_id, "train/loss")
    return [point.step for point in history]


def feed(run_dir: Path, last: int) -> None:
    """Training has come to step ``last``."""
    write_journal(run_dir, [each for each in journal_records(100) if each["step"] <= last])


def wait_for_step(server: Server, run_id: str, step: int) -> None:
    deadline = time.monotonic() + 60
    while step not in steps_at(server, run_id):
        assert time.monotonic() < deadline, f"step {step} did not arrive"
        time.sleep(0.2)


def test_nothing_is_lost_or_doubled_when_the_server_comes_back(
    server: Server, make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config(tracking={"uri": server.uri})
    run_dir = make_run(config, steps=100)
    feed(run_dir, 0)
    tracker = open_tracker(config, run_dir)
    feed(run_dir, 30)
    wait_for_step(server, tracker.run_id, 30)
    server.kill()
    feed(run_dir, 60)
    time.sleep(2)
    server.start()
    wait_for_step(server, tracker.run_id, 60)
    feed(run_dir, 100)
    assert tracker.finish("FINISHED") is None
    assert steps_at(server, tracker.run_id) == list(range(5, 101, 5))


def holding(folder: Path, secret: str) -> list[str]:
    """Files below ``folder`` that hold a text."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_a_run_that_ends_without_its_server_says_how_to_send_the_rest(
    server: Server,
    make_config: MakeConfig,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    with_password = server.uri.replace("http://", f"http://me:{CANARY}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    config = make_config()
    run_dir = make_run(config, steps=100)
    feed(run_dir, 0)
    tracker = open_tracker(config, run_dir)
    feed(run_dir, 30)
    wait_for_step(server, tracker.run_id, 30)
    server.kill()
    feed(run_dir, 100)
    begun = time.monotonic()
    missing = tracker.finish("FINISHED")
    assert time.monotonic() - begun < 30
    assert missing is not None and f"python -m d3etr.tracking {run_dir}" in missing
    server.start()
    assert replay(run_dir) is None
    assert steps_at(server, tracker.run_id) == list(range(5, 101, 5))
    run = MlflowClient(tracking_uri=server.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    state = read_state(run_dir)
    assert state is not None and state.complete
    assert CANARY not in missing + caplog.text
    assert holding(tmp_path, CANARY) == [], "in the run's folder, or in what MLflow was sent"
