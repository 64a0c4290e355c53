"""Latencies of a benchmark at the runs in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tracked_folders import run_of

from d3etr.cli.main import main
from d3etr.config.tree import Config
from d3etr.detectors.weights import read_info
from d3etr.tracking.runs import replay

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def test_runs_in_mlflow_get_the_latency_of_their_network(
    make_config: MakeConfig,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs = [make_config("plain"), make_config("other", optimisation={"steps": 30})]
    tracked, untracked = map(make_run, configs)
    assert replay(tracked) is None
    network = read_info(tracked / "weights.safetensors").network
    row = {"run_as": "eager float32", "batch": 1, "p50_ms": 4.25, "network": network}
    file = tmp_path / "latency.json"
    file.write_text(json.dumps({"device": "CPU, 2 threads", "machine": "Abacus", "rows": [row]}))
    command = ["compare", str(tracked), str(untracked), "--track"]
    assert main(command) == 2
    assert "give them by --latency FILE" in capsys.readouterr().err
    assert main([*command, "--latency", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    assert [x["latency_ms"] for x in json.loads(printed.out)["groups"]] == [4.25, 4.25]
    assert f"warning: {untracked} has no run in MLflow" in printed.err
    found = run_of(configs[0], tracked).data
    assert found.metrics["model/latency_ms"] == 4.25
    assert found.tags["latency_machine"] == "Abacus, CPU, 2 threads, 1 at once"
