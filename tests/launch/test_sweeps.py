"""Sweeps on a real Ray, one for all: failures, resume, room, Optuna with ASHA."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from sweep_runs import RATE, MakePlan, run, steps

from d3etr.config.load import load_config
from d3etr.engine.journal import read_journal
from d3etr.errors import UserError
from d3etr.launch.sweeps.driver import run_sweep
from d3etr.tracking.sender import readable

pytestmark = pytest.mark.slow

EPOCHS = 16
"""Of trials, so that the driver dies in the middle of one."""


@pytest.mark.usefixtures("cluster")
def test_a_trial_that_fails_stops_no_other_and_says_why(
    make_plan_of: MakePlan, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    missing = tmp_path / "missing.safetensors"
    cases = {"as it is": {}, "broken": {"set": [f"student.backbone_weights={missing}"]}}
    plan = make_plan_of("tracking.enabled=true", "tracking.figures=false", cases=cases, seeds=[1])
    result, said = run(plan)
    good, broken = result.trials
    assert (good.state, broken.state) == ("finished", "failed")
    assert "missing.safetensors" in (broken.reason or "")
    assert any("broken failed" in line and "missing" in line for line in said)
    assert result.best == good

    best = load_config(plan.folder / "best.yaml")
    assert best.run.seed == 1 and best.run.name == "tried-best"
    written = (plan.folder / "table.md").read_text()
    assert "| **as it is** | 18 |" in written, "the best"
    assert "\n- failed: broken: " in written and "missing.safetensors" in written
    content = json.loads((plan.folder / "results.json").read_text())
    assert [trial["state"] for trial in content["trials"]] == ["finished", "failed"]

    client = MlflowClient(f"sqlite:///{plan.folder.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'd3etr'")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.data.tags["role"] == "sweep")
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert [child.info.run_name for child in children] == ["as it is"]
    assert children[0].info.status == parent.info.status == "FINISHED"
    assert parent.data.metrics["val/mAP"] == readable(good.mAP or 0)
    assert parent.data.metrics["val/kept_mAP"] == parent.data.metrics["val/mAP"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "table.md", "results.json", "sweep.yaml"} <= files
    champion = client.get_model_version_by_alias("d3etr-student", "champion")
    assert champion.run_id == children[0].info.run_id

    # Again: what finished is not trained again, what failed is tried again.
    begun = (good.run_dir or Path()).stat().st_mtime
    again, _ = run(plan)
    assert [trial.state for trial in again.trials] == ["finished", "failed"]
    assert steps(again.trials[0].run_dir or Path(), "start") == [0]
    assert (good.run_dir or Path()).stat().st_mtime >= begun


def test_a_killed_driver_loses_no_trial_and_no_epoch(
    make_plan_of: MakePlan, tmp_path: Path
) -> None:
    space = {RATE: {"grid": [1e-3, 1e-4]}}
    sets = [f"optimisation.epochs={EPOCHS}", "run.checkpoint_every_epochs=1"]
    plan = make_plan_of(*sets, space=space, maximum_concurrent=1)
    arguments = [str(tmp_path / "sweep.yaml"), *(p for s in sets for p in ("--set", s))]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "sweeps" / "run.py"), *arguments]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
    _wait_for(lambda: len(list(plan.folder.glob("001_*/checkpoints/step-*"))) > 1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    (first,) = plan.folder.glob("000_*")
    finished_at = (first / "summary.json").stat().st_mtime_ns

    resumed = [*command[:2], "--resume", str(plan.folder), "--json"]
    done = subprocess.run(resumed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[2/2]" in done.stderr, "what finished before is counted"
    states = [trial["state"] for trial in json.loads(done.stdout)["trials"]]
    assert states == ["finished", "finished"]
    assert (first / "summary.json").stat().st_mtime_ns == finished_at
    (other,) = plan.folder.glob("001_*")
    starts = steps(other, "start")
    assert len(starts) == 2 and starts[1] >= 6, "went on from a checkpoint"
    assert steps(other) == sorted(set(steps(other))) and steps(other)[-1] == 6 * EPOCHS
    evaluations = steps(other, "evaluation")
    assert evaluations == list(range(6, 6 * EPOCHS + 1, 6)), "each epoch once"


def _wait_for(happened: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster")
def test_trials_with_several_workers_take_turns_where_there_is_room_for_one(
    make_plan_of: MakePlan,
) -> None:
    space = {RATE: {"grid": [1e-3, 1e-4]}}
    result, said = run(make_plan_of("cluster.workers=2", "optimisation.epochs=1", space=space))
    assert any("2 trials, 1 at a time, each 2 workers with 1 CPU" in line for line in said)
    assert [trial.state for trial in result.trials] == ["finished", "finished"]
    for trial in result.trials:
        start = read_journal((trial.run_dir or Path()) / "journal.jsonl")[0]
        assert start["workers"] == 2


@pytest.mark.usefixtures("cluster")
def test_what_another_sweep_or_run_has_trained_is_not_trained_again(
    make_plan_of: MakePlan,
) -> None:
    first = run(make_plan_of(space={RATE: {"grid": [1e-3]}}))[0]
    second = run(make_plan_of(space={RATE: {"grid": [1e-4, 1e-3]}}))[0]
    assert second.folder != first.folder
    assert [trial.state for trial in second.trials] == ["finished", "finished"]
    assert second.trials[1].run_dir == first.trials[0].run_dir
    assert second.trials[1].mAP == first.trials[0].mAP


@pytest.mark.usefixtures("cluster")
def test_a_damaged_result_costs_no_step(
    make_plan_of: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan_of("optimisation.epochs=1", space={RATE: {"grid": [1e-3, 1e-4]}})
    first = run(plan)[0]
    folders = [trial.run_dir or Path() for trial in first.trials]
    (folders[1] / "summary.json").write_text("{")
    again = run(plan)[0]
    assert "summary.json is damaged" in caplog.text
    assert [trial.state for trial in again.trials] == ["finished", "finished"]
    assert [trial.run_dir for trial in again.trials] == folders
    assert [trial.mAP for trial in again.trials] == [trial.mAP for trial in first.trials]
    for folder in folders:
        assert steps(folder) == list(range(1, 7)), "no step was trained again"


@pytest.mark.usefixtures("cluster")
def test_optuna_proposes_and_asha_stops_the_worse(make_plan_of: MakePlan) -> None:
    space = {
        RATE: {"loguniform": [1e-6, 1e-2]},
        "optimisation.schedule.kind": {"choice": ["constant", "cosine"]},
        "optimisation.schedule.final_factor": {
            "uniform": [0.0, 0.5],
            "when": {"optimisation.schedule.kind": ["cosine"]},
        },
    }
    search = {"method": "optuna", "trials": 6, "startup_trials": 3}
    plan = make_plan_of(space=space, search=search, pruning={"reduction": 2})
    result, _ = run(plan)
    assert [trial.trial.number for trial in result.trials] == list(range(6))
    states = [trial.state for trial in result.trials]
    assert set(states) <= {"finished", "pruned"} and "finished" in states
    for trial in result.trials:
        point = trial.trial.point
        conditional = "optimisation.schedule.final_factor" in point
        assert conditional == (point["optimisation.schedule.kind"] == "cosine")
        assert trial.run_dir is not None
        assert load_config(trial.run_dir / "config.yaml").optimisation.learning_rate == point[RATE]
        assert (trial.state == "finished") == (steps(trial.run_dir)[-1] == 18)
    again, said = run(plan)
    assert [trial.state for trial in again.trials] == states
    assert any(line.startswith("going on with") for line in said)


@pytest.fixture
def full_cluster(cluster: None) -> Iterator[None]:
    """The local Ray, whose CPUs are taken."""

    @ray.remote(num_cpus=2)
    class Other:
        def there(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.there.remote())
    yield
    ray.kill(other)


@pytest.mark.usefixtures("full_cluster")
def test_room_that_others_never_give_back_ends_a_sweep_with_one_text(
    make_plan_of: MakePlan, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    sets = ["cluster.start_timeout_seconds=1", "tracking.enabled=true"]
    plan = make_plan_of(*sets, space={RATE: {"grid": [1e-3, 1e-4]}})
    lines: list[str] = []
    with pytest.raises(UserError, match=r"no room for a trial .* of which 0 CPUs .* 2 seconds"):
        run_sweep(plan, command="test", on_progress=lines.append)
    assert any("waiting for other jobs" in line for line in lines)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'd3etr'")
    (parent,) = client.search_runs([experiment.experiment_id])
    assert parent.info.status == "FAILED"
