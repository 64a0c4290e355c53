"""How runs end in MLflow: the status never depends on what is sent last."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.tracking.dbmodels.models import SqlDataset
from tracked_folders import client_of, journal_records, run_of, write_journal

from d3etr.config.tree import Config
from d3etr.tracking.runs import open_tracker, replay
from d3etr.tracking.sweeps import SweepRun

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def test_a_run_without_an_artifact_store_is_finished_and_says_what_is_missing(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config(tracking={"register_as": "tiny-student"})
    run_dir = make_run(config)
    in_the_way = config.run.output / "mlartifacts"
    in_the_way.write_text("no folder can be made here")
    tracker = open_tracker(config, run_dir)
    missing = tracker.finish("FINISHED")
    assert missing is not None and f"python -m d3etr.tracking {run_dir}" in missing
    run = run_of(config, run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/mAP"] == 0.25
    for name in ("config.yaml", "summary.json", "weights", "model", "registered model"):
        assert name in missing and name in run.data.tags["missing"]
    assert run.data.tags["data_digest"] == "d" * 16
    in_the_way.unlink()
    assert replay(run_dir) is None
    run = run_of(config, run_dir)
    assert run.info.status == "FINISHED" and "missing" not in run.data.tags
    names = {file.path for file in client_of(config).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json", "weights"} <= names
    assert client_of(config).get_model_version_by_alias("tiny-student", "champion")


def fails(*arguments: object, **keywords: object) -> None:
    raise ConnectionError("gone for a moment")


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ("mlflow.tracking.MlflowClient.log_inputs", "data set"),
        ("d3etr.tracking.figures.collect.draw_figures", "figures"),
        ("d3etr.tracking.runs.register", "registered model"),
    ],
)
def test_what_cannot_be_sent_costs_nothing_else_and_is_sent_later(
    broken: str, missing: str, make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config(tracking={"register_as": "tiny-student", "figures": True})
    run_dir, client = make_run(config), client_of(config)
    tracker = open_tracker(config, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d3etr.tracking.figures.collect.draw_figures", lambda *given: [])
        patch.setattr(broken, fails)
        lacking = tracker.finish("FINISHED")
        assert lacking is not None and f": {missing} (gone for a moment)" in lacking
        run = run_of(config, run_dir)
        assert run.info.status == "FINISHED"
        assert run.data.tags["missing"] == f"{missing} (gone for a moment)"
        [model] = client.search_logged_models([run.info.experiment_id])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d3etr.tracking.figures.collect.draw_figures", lambda *given: [])
        assert replay(run_dir) is None
    run = run_of(config, run_dir)
    assert "missing" not in run.data.tags and len(run.inputs.dataset_inputs) == 1
    assert [found.model_id for found in client.search_logged_models(["1"])] == [model.model_id]
    assert len(client.search_model_versions("name='tiny-student'")) == 1


def test_two_runs_that_end_together_both_end_whole(
    make_config: MakeConfig, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [make_config(seed=seed, tracking={"register_as": "tiny"}) for seed in (0, 1)]
    folders = [make_run(config, mAP) for config, mAP in zip(configs, (0.3, 0.4), strict=True)]
    trackers = [open_tracker(*each) for each in zip(configs, folders, strict=True)]
    together, make = threading.Barrier(2), SqlDataset.__init__

    def make_while_the_other_does(*arguments: Any, **keywords: Any) -> None:
        together.wait(60)
        make(*arguments, **keywords)

    monkeypatch.setattr(SqlDataset, "__init__", make_while_the_other_does)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda tracker: tracker.finish("FINISHED"), trackers)) == [None, None]
    for config, folder in zip(configs, folders, strict=True):
        run = run_of(config, folder)
        assert run.info.status == "FINISHED" and len(run.inputs.dataset_inputs) == 1
    champion = client_of(configs[0]).get_model_version_by_alias("tiny", "champion")
    assert champion.tags["mAP"] == "0.4000"


def test_a_sweep_is_finished_whatever_of_its_results_cannot_be_sent(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = make_config(), tmp_path / "runs" / "ratios"
    folder.mkdir()
    table = folder / "table.csv"
    table.write_text("trial\n")
    (tmp_path / "runs" / "mlartifacts").write_text("no folder can be made here")
    sweep = SweepRun(config, folder, "The matching ratios", {"seeds": "0"})
    missing = sweep.finish("FINISHED", [], [table])
    assert missing is not None and "table.csv" in missing and str(folder) in missing
    run = run_of(config, folder)
    assert run.info.status == "FINISHED" and "table.csv" in run.data.tags["missing"]
    assert run.data.metrics["trials/finished"] == 0


def test_a_slow_server_gets_few_files_and_a_person_sees_which(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config(tracking={"register_as": "tiny"})
    tracker = open_tracker(config, make_run(config))
    seen: list[str] = []
    assert tracker.finish("FINISHED", seen.append) is None
    names = ["config.yaml", "summary.json", "journal.jsonl", "findings", "description"]
    names += ["weights", "data set", "model card", "model"]
    expected = [f"sending results to MLflow: {name}" for name in [*names, "registered model"]]
    assert seen == expected
    [model] = client_of(config).search_logged_models(["1"])
    assert {metric.key: metric.value for metric in model.metrics}["val/mAP"] == 0.25
    stored = Path(model.artifact_location.removeprefix("file://"))
    files = [str(file.relative_to(stored)) for file in stored.rglob("*") if file.is_file()]
    assert {"code/d3etr.zip", "artifacts/weights.safetensors", "MLmodel"} <= set(files)
    assert len(files) <= 8


def test_the_model_has_the_metrics_of_the_weights_that_were_kept(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    folder = make_run(config, mAP=0.5, steps=30)
    records = journal_records(30, 0.75)  # 0.25, 0.5, 0.75
    records[-1]["metrics"]["val/mAP"] = 0.125
    write_journal(folder, records)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"kept_step": 20}))
    assert open_tracker(config, folder).finish("FINISHED") is None
    [model] = client_of(config).search_logged_models(["1"])
    found = {metric.key: (metric.step, metric.value) for metric in model.metrics}
    assert found["val/mAP"] == (20, 0.5) and found["train/loss"] == (20, 0.5)
    assert [made.step for made in run_of(config, folder).outputs.model_outputs] == [20]
    history = client_of(config).get_metric_history(run_of(config, folder).info.run_id, "val/mAP")
    assert [(point.step, point.value) for point in history] == [(10, 0.25), (20, 0.5), (30, 0.125)]
