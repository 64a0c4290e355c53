"""A small configuration, run folders as training leaves them, an MLflow server to kill."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tracked_folders import TINY, journal_records, write_journal, write_weights

from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.tracking.server import connect

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]
START_SECONDS = 180
"""A busy machine takes long to start a server."""


@pytest.fixture(autouse=True)
def _no_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri(None)  # another test may have left its own
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def make_config(tmp_path: Path, empty_database: Path) -> MakeConfig:
    """Configurations of tiny runs below ``tmp_path``; keywords replace sections' entries."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")

    def make(name: str = "plain-student", seed: int = 0, **sections: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "run": {"name": name, "seed": seed, "output": str(tmp_path / "runs")},
            "data": {
                "digit_scenes": {
                    "root": str(tmp_path / "data"),
                    "train_images": 8,
                    "validation_images": 4,
                    "test_images": 2,
                    "image_size": 32,
                    "maximum_scale": 16,
                },
                "preprocessing": {"shortest_side": None, "longest_side": None},
            },
            "student": {"detector": TINY.model_dump(mode="json")},
            "optimisation": {"steps": 20, "batch_size": 4},
            "tracking": {"figures": False},
        }
        for section, changes in sections.items():
            tree[section] = tree.get(section, {}) | changes
        return Config.model_validate_json(json.dumps(tree))

    return make


@pytest.fixture
def make_run() -> MakeRun:
    """Run folders as training leaves them."""

    def make(config: Config, mAP: float = 0.25, steps: int = 20, finished: bool = True) -> Path:
        folder = config.run.output / f"{config.run.name}-{config.run.seed:08x}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        write_journal(folder, journal_records(steps, mAP))
        if finished:
            write_weights(folder / "weights.safetensors", mAP)
            summary = {"method": "none", "mAP": mAP, "AP50": 2 * mAP, "seconds": 12.5}
            (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return folder

    return make


class Server:
    """An ``mlflow server`` on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(4 * START_SECONDS):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.25)
        raise AssertionError(f"the MLflow server did not start within {START_SECONDS} s")

    def kill(self) -> None:
        """End it and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    """A running server with a database of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "server.db")
    running = Server(folder)
    try:
        running.start()
        yield running
    finally:
        running.kill()
