"""A sweep whose driver died while it sent trials to MLflow, gone on with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from d3etr.config.load import to_yaml
from d3etr.config.sweep import load_sweep
from d3etr.config.tree import Config
from d3etr.launch.sweeps.plan import Plan, make_plan
from d3etr.launch.sweeps.results import TrialResult
from d3etr.launch.sweeps.trial_tracking import SweepTracking
from d3etr.tracking.sweeps import DEFAULT_MODEL

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


@pytest.fixture
def swept(
    make_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> tuple[Plan, list[TrialResult]]:
    """Two finished trials, the second better, one that failed and one that was stopped."""
    (tmp_path / "tiny.yaml").write_text(to_yaml(make_config()))
    text = f"name: tried\nrecipe: {tmp_path / 'tiny.yaml'}\nspace:\n"
    text += "  optimisation.learning_rate: {grid: [0.001, 0.002, 0.003, 0.004]}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    plan = make_plan(load_sweep(tmp_path / "sweep.yaml"))
    results = []
    for trial, mAP in zip(plan.trials, (0.2, 0.3, None, None), strict=True):
        finished = mAP is not None
        run_dir = make_run(plan.config(trial), mAP or 0.1, finished=finished)
        summary: dict[str, Any] | None = {"mAP": mAP, "steps": 20} if finished else None
        state = "finished" if finished else ("failed", "pruned")[trial.number - 2]
        reason = "out of memory" if state == "failed" else None
        results.append(TrialResult(trial, state, run_dir, summary, mAP, 2, reason))  # type: ignore
    return plan, results


def children(plan: Plan) -> dict[str, Any]:
    """Runs of the trials, by name."""
    client = MlflowClient(plan.base.tracking.uri or f"sqlite:///{plan.folder.parent}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'd3etr'")
    runs = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}


def test_what_a_dead_driver_was_sending_is_sent_and_the_best_registered(
    swept: tuple[Plan, list[TrialResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, results = swept
    titles = [result.trial.title(plan.sweep) for result in results]

    def die(*arguments: Any, **keywords: Any) -> None:
        raise SystemExit  # nothing after it happens, as after SIGKILL

    with monkeypatch.context() as patched:
        patched.setattr("d3etr.tracking.open_run.OpenRun.close", die)
        first = SweepTracking(plan)
        for result in results:
            assert result.run_dir is not None
            first.follow(result.run_dir, result.trial)
            first.end(result.run_dir, "FINISHED")
        first.close()
    assert {run.info.status for run in children(plan).values()} == {"RUNNING"}

    # Ray Tune knows that all have ended: it reports nothing about them any more.
    SweepTracking(plan).finish(results, [])
    found = children(plan)
    statuses = [found[title].info.status for title in titles]
    assert statuses == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    tagged = ["stopped_early" in found[title].data.tags for title in titles]
    assert tagged == [False, False, False, True], "stopped on purpose is no failure"
    assert found[titles[1]].data.metrics["val/mAP"] == 0.3
    client = MlflowClient(f"sqlite:///{plan.folder.parent}/mlflow.db")
    champion = client.get_model_version_by_alias(DEFAULT_MODEL, "champion")
    assert champion.run_id == found[titles[1]].info.run_id

    SweepTracking(plan).finish(results, [])
    assert len(client.search_model_versions(f"name = '{DEFAULT_MODEL}'")) == 1
    assert len(children(plan)) == len(titles)


def test_trials_of_an_interrupted_sweep_follow_it_to_another_mlflow(
    swept: tuple[Plan, list[TrialResult]], empty_database: Path, tmp_path: Path
) -> None:
    plan, results = swept
    shutil.copy(empty_database, tmp_path / "other.db")
    place = {"tracking": {"uri": f"sqlite:///{tmp_path / 'other.db'}"}}
    trees = {path: tree | place for path, tree in plan.trees.items()}
    other = replace(plan, trees=trees, tracking_uri=None)
    SweepTracking(other).finish(results[:1], [])
    assert list(children(other)) == [results[0].trial.title(plan.sweep)]


def test_a_trial_whose_tracking_state_is_damaged_is_named_and_stops_no_other(
    swept: tuple[Plan, list[TrialResult]], caplog: pytest.LogCaptureFixture
) -> None:
    plan, results = swept
    damaged = results[0].run_dir
    assert damaged is not None
    (damaged / "mlflow_run.json").write_text("{")
    SweepTracking(plan).finish(results[:2], [])
    assert "mlflow_run.json is damaged" in caplog.text
    (found,) = children(plan).values()
    assert found.info.status == "FINISHED" and found.data.metrics["val/mAP"] == 0.3
