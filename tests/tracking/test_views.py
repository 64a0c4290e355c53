"""Addresses and views of MLflow's pages."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from d3etr.config.tree import Config
from d3etr.tracking.address import how_to_open, run_page
from d3etr.tracking.runs import replay
from d3etr.tracking.server import connect, tracking_uri
from d3etr.tracking.state import RunState, read_state
from d3etr.tracking.sweeps import SweepRun
from d3etr.tracking.views import LONGEST_TAG, TAG, comparison_page, comparison_view, share

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def test_a_server_needs_an_address_only_a_file_a_command_too() -> None:
    page = run_page("1", "abc")
    assert how_to_open("http://user:word@host:5000/", page) == [
        "http://host:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    ]
    command, address = how_to_open("sqlite:////my runs/mlflow.db", page, "py")
    assert (
        command == "py -m mlflow ui --backend-store-uri 'sqlite:////my runs/mlflow.db' --port 5000"
    )
    assert address == f"http://127.0.0.1:5000/{page}"


def test_a_comparison_is_kept_as_a_view_of_the_experiment(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    states = []
    for seed in (0, 1):
        folder = make_run(make_config(seed=seed))
        assert replay(folder) is None
        states.append(read_state(folder))
    known = [state for state in states if state is not None]
    config = make_config()
    page = comparison_page(config, known, last_step=20)
    assert page == comparison_page(config, known, last_step=20), "kept once"
    client = connect(tracking_uri(config))
    tags = client.get_experiment(known[0].experiment_id).tags
    key = parse_qs(urlsplit(page.removeprefix("#")).query)["viewStateShareKey"][0]
    assert [tag for tag in tags if tag.startswith(TAG)] == [TAG + key]
    view = json.loads(tags[TAG + key])
    found = client.search_runs([known[0].experiment_id], view["searchFilter"])
    assert {run.info.run_id for run in found} == {state.run_id for state in known}
    assert view["compareRunCharts"][0]["metricKey"] == "val/mAP"
    sections = {section["uuid"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} <= sections


def test_without_mlflow_a_comparison_is_mlflows_own_page(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.db"
    broken.write_text("this is no database", encoding="utf-8")
    config = make_config(tracking={"uri": f"sqlite:///{broken}"})
    state = RunState(tracking_uri="x", experiment_id="1", run_id="abc")
    with caplog.at_level(logging.WARNING):
        assert comparison_page(config, [state]).startswith("#/compare-runs?runs=%5B%22abc%22%5D")
    assert "without their charts" in caplog.text


def test_a_view_that_is_too_long_for_mlflow_is_a_selection_only(make_config: MakeConfig) -> None:
    config = make_config()
    client = connect(tracking_uri(config))
    experiment = client.create_experiment("long")
    view = comparison_view([f"{number:032x}" for number in range(200)])
    assert len(json.dumps(view)) > LONGEST_TAG
    page = share(client, experiment, view)
    assert "searchFilter=attributes.run_id%20IN" in page and "viewStateShareKey" not in page


def test_a_sweep_has_a_view_of_its_trials_and_says_where(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "ratios-12345678"
    folder.mkdir()
    keys = ["distillation.adaptive_ratio"]
    sweep = SweepRun(make_config(), folder, "The ratios", {"recipe": "x.yaml"}, keys)
    state = read_state(folder)
    assert state is not None
    run = connect(tracking_uri(make_config())).get_run(sweep.run_id)
    assert run.info.run_name == "sweep · ratios-12345678"
    _, address = sweep.how_to_open()
    assert address.removeprefix("http://127.0.0.1:5000/") in run.data.tags["mlflow.note.content"]
    client = connect(tracking_uri(make_config()))
    [text] = [
        value
        for key, value in client.get_experiment(state.experiment_id).tags.items()
        if key.startswith(TAG)
    ]
    view = json.loads(text)
    assert view["searchFilter"] == f"tags.`mlflow.parentRunId` = '{sweep.run_id}'"
    assert view["compareRunCharts"][0]["selectedParams"] == keys
    assert "params.`distillation.adaptive_ratio`" in view["selectedColumns"]
