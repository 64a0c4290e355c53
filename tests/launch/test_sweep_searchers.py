"""Searches on a real Ray: Optuna's proposals that ASHA prunes, and populations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sweep_runs import RATE, MakePlan, run, steps

from d3etr.config.load import load_config
from d3etr.launch.sweeps.driver import SweepResult
from d3etr.launch.sweeps.results import TrialResult

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


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


def test_a_population_copies_the_weights_of_its_best(make_plan_of: MakePlan) -> None:
    space = {RATE: {"choice": [1e-3, 1e-9]}}
    search = {"method": "population", "trials": 4, "seed": 3}
    result, said = run(make_plan_of("optimisation.epochs=4", space=space, search=search))
    assert [trial.state for trial in result.trials] == ["finished"] * 4
    heirs = [trial for trial in result.trials if "_from-" in (trial.run_dir or Path()).name]
    assert heirs, "nobody copied anybody"
    assert any("goes on from another trial's weights" in line for line in said)
    for heir in heirs:
        _assert_inherited(heir, result)


def _assert_inherited(heir: TrialResult, result: SweepResult) -> None:
    run_dir = heir.run_dir or Path()
    step = int(run_dir.name.rpartition("-at-")[2].partition("-")[0])
    origin = int(run_dir.name.rpartition("_from-")[2].partition("-")[0])
    assert steps(run_dir, "start")[0] == step, "it begins where the other one was"
    given = [*result.folder.glob(f"{origin:03d}_*/checkpoints/step-{step:08d}")]
    kept = run_dir / "checkpoints" / f"step-{step:08d}"
    if not given or not kept.exists():
        return  # pruned since, as checkpoints are
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (kept, given[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
