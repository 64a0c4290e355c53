"""Addresses of MLflow's pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from d3etr.config.tree import Config
from d3etr.text import redacted
from d3etr.tracking.address import BEST_FIRST, embedded_uri, how_to_open, run_page, runs_page
from d3etr.tracking.charts import TAG, charted_page
from d3etr.tracking.server import connect, tracking_uri
from d3etr.tracking.state import read_state
from d3etr.tracking.sweeps import SweepRun

MakeConfig = Callable[..., Config]


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


def test_the_embedded_database_is_named_whatever_links_its_folder_is(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a"), ("c", "d")):
        (tmp_path / name).symlink_to(other)
    assert embedded_uri(tmp_path / "c") == f"sqlite:///{tmp_path.resolve()}/d/mlflow.db"
    assert embedded_uri(tmp_path / "a").endswith("/mlflow.db"), "making the folder says it"


def test_a_page_of_runs_names_which_and_in_what_order() -> None:
    page = runs_page("1", "attributes.run_id IN ('a', 'b')", "attributes.start_time")
    place, _, query = page.partition("?")
    assert place == "#/experiments/1/runs"
    assert {key: value for key, [value] in parse_qs(query).items()} == {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": "attributes.run_id IN ('a', 'b')",
        "orderByKey": "attributes.start_time",
        "orderByAsc": "false",
    }


def test_a_page_of_runs_is_printed_whole() -> None:
    search = f"tags.`mlflow.parentRunId` = '{'0f3a9c5d7e8b4a6f' * 2}'"
    page = runs_page("1", search, BEST_FIRST)
    assert redacted(page) == page, "nothing in it is a secret"


def test_a_sweep_leads_to_its_trials(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "ratios-12345678"
    folder.mkdir()
    sweep = SweepRun(make_config(), folder, "The ratios", {"recipe": "x.yaml"})
    state = read_state(folder)
    assert state is not None
    client = connect(tracking_uri(make_config()))
    run = client.get_run(sweep.run_id)
    assert run.info.run_name == "sweep · ratios-12345678"
    _, address = sweep.how_to_open()
    page = address.removeprefix("http://127.0.0.1:5000/")
    assert page in run.data.tags["mlflow.note.content"]
    [key] = parse_qs(page.partition("?")[2])["viewStateShareKey"]
    assert redacted(page) == page, "a view's key is no secret"
    view = json.loads(client.get_experiment(state.experiment_id).tags[TAG + key])
    assert client.search_runs([state.experiment_id], view["searchFilter"]) == []
    assert view["searchFilter"] == f"tags.`mlflow.parentRunId` = '{sweep.run_id}'"
    assert view["orderByKey"] == "metrics.`val/kept_mAP`" and not view["orderByAsc"]
    assert view["compareRunCharts"][0]["metricKey"] == "val/mAP"


def test_very_many_runs_are_listed_without_a_view(make_config: MakeConfig) -> None:
    client = connect(tracking_uri(make_config()))
    listed = ", ".join(f"'{number:032x}'" for number in range(200))
    page = charted_page(client, "0", f"attributes.run_id IN ({listed})", "attributes.start_time")
    assert "searchFilter" in page and not client.get_experiment("0").tags
