"""Sweeps before anything runs: what they try, what trials are called, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from d3etr.config.problems import ConfigError
from d3etr.config.sweep import SweepConfig, load_sweep
from d3etr.engine.find_run import folder_of
from d3etr.launch.sweeps.plan import Plan, make_plan
from d3etr.launch.sweeps.results import TrialResult, best, best_line, table
from d3etr.launch.sweeps.trials import (
    NUMBER,
    POINT,
    Trial,
    planned_trials,
    random_points,
    short_names,
)

RATES = "optimisation.learning_rate"
RATIO, QUERIES = "distillation.adaptive_ratio", "distillation.teacher_query_ratio"
INHERITED = "distillation.inherited_ratio"
WriteSweep = Callable[..., Path]


@pytest.fixture
def write_sweep(tmp_path: Path, recipe: Path) -> WriteSweep:
    """Write a sweep file over the tiny recipe; keyword arguments are its keys."""

    def write(**keys: Any) -> Path:
        tree = {"name": "tried", "recipe": str(recipe), **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def make_sweep(write_sweep: WriteSweep) -> Callable[..., SweepConfig]:
    return lambda **keys: load_sweep(write_sweep(**keys))


def titles(sweep: SweepConfig) -> list[str]:
    return [trial.title(sweep) for trial in planned_trials(sweep)]


MakeSweep = Callable[..., SweepConfig]


def test_a_grid_is_every_combination_seeds_first(make_sweep: MakeSweep) -> None:
    space = {RATES: {"grid": [0.1, 0.2]}, "optimisation.batch_size": {"grid": [4, 8]}}
    sweep = make_sweep(space=space, seeds=[3, 5])
    assert titles(sweep)[:5] == [
        "learning_rate=0.1, batch_size=4, seed=3",
        "learning_rate=0.1, batch_size=8, seed=3",
        "learning_rate=0.2, batch_size=4, seed=3",
        "learning_rate=0.2, batch_size=8, seed=3",
        "learning_rate=0.1, batch_size=4, seed=5",
    ]
    assert [trial.number for trial in planned_trials(sweep)] == list(range(8))


def test_a_condition_leaves_a_key_alone_where_it_does_not_hold(make_sweep: MakeSweep) -> None:
    space = {
        RATIO: {"grid": [0.5, 1.0]},
        QUERIES: {"grid": [0.5, 1.0], "when": {RATIO: [0.5]}},
    }
    assert titles(make_sweep(space=space)) == [
        "adaptive_ratio=0.5, teacher_query_ratio=0.5",
        "adaptive_ratio=0.5, teacher_query_ratio=1",
        "adaptive_ratio=1",
    ]


def test_null_is_a_value_and_not_a_key_that_is_left_alone(make_sweep: MakeSweep) -> None:
    space = {
        RATES: {"grid": [0.1, 0.2]},
        "optimisation.clip_norm": {"grid": [None, 1.0], "when": {RATES: [0.1]}},
        QUERIES: {"grid": [0.5], "when": {"optimisation.clip_norm": [None]}},
    }
    assert titles(make_sweep(space=space)) == [
        "learning_rate=0.1, clip_norm=None, teacher_query_ratio=0.5",
        "learning_rate=0.1, clip_norm=1",
        "learning_rate=0.2",
    ]


def test_the_three_matchings_are_swept_by_their_ratios(make_sweep: MakeSweep) -> None:
    space = {
        INHERITED: {"grid": [0.0, 0.5, 1.0]},
        RATIO: {"grid": [0.0, 1.0], "when": {INHERITED: [0.0, 0.5]}},
        QUERIES: {"grid": [0.5], "when": {RATIO: [0.0]}},
    }
    changes = ["distillation.method=d3etr", "teacher={weights: teacher.safetensors}"]
    plan = make_plan(make_sweep(space=space, set=[*changes, "student.initialise_from={}"]))
    assert [plan.config(trial).distillation.inherited_share for trial in plan.trials] == [
        *(0.0, 0.0, 0.5, 0.5, 1.0)
    ]


def test_random_points_of_a_finite_space_are_tried_once_each(
    make_sweep: MakeSweep, caplog: pytest.LogCaptureFixture
) -> None:
    space = {RATES: {"choice": [0.1, 0.2]}, "optimisation.batch_size": {"choice": [4, 8, 16]}}
    for trials, found in ((5, 5), (6, 6), (9, 6)):
        sweep = make_sweep(space=space, search={"method": "random", "trials": trials}, seeds=[0, 1])
        points = [str(trial.point) for trial in planned_trials(sweep) if trial.seed == 0]
        assert len(points) == len(set(points)) == found
        assert ("no more, search.trials is 9" in caplog.text) == (trials > found)


def test_random_points_follow_the_seed_and_stay_in_range(make_sweep: MakeSweep) -> None:
    space = {
        RATES: {"loguniform": [1e-4, 1e-2]},
        RATIO: {"uniform": [0.25, 0.75]},
        "distillation.method": {"choice": ["none", "d3etr"]},
    }
    sweeps = [
        make_sweep(space=space, search={"method": "random", "trials": 40, "seed": seed})
        for seed in (0, 0, 1)
    ]
    points = [[trial.point for trial in planned_trials(sweep)] for sweep in sweeps]
    assert points[0] == points[1] != points[2]
    rates = [point[RATES] for point in points[0]]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(20, abs=10), "evenly in logarithm"
    assert all(0.25 <= point[RATIO] <= 0.75 for point in points[0])
    assert {point["distillation.method"] for point in points[0]} == {"none", "d3etr"}


def test_random_trials_sample_anew_for_every_combination_of_grids(make_sweep: MakeSweep) -> None:
    space = {"optimisation.batch_size": {"grid": [4, 8]}, RATES: {"uniform": [0.1, 0.2]}}
    sweep = make_sweep(space=space, search={"method": "random", "trials": 3})
    points = [trial.point for trial in planned_trials(sweep)]
    assert [point["optimisation.batch_size"] for point in points] == [4, 8] * 3
    assert len({point[RATES] for point in points}) == 6


def test_names_are_made_from_what_varies(make_sweep: MakeSweep) -> None:
    keys = ["distillation.prediction.weight", "distillation.self_attention.weight", RATIO]
    assert list(short_names(keys).values()) == [
        "prediction.weight",
        "self_attention.weight",
        "adaptive_ratio",
    ]
    sweep = make_sweep(space={RATES: {"grid": [1e-5]}}, seeds=[0, 1])
    names = [trial.name(sweep) for trial in planned_trials(sweep)]
    assert names == ["000_learning_rate-1e-05_seed-0", "001_learning_rate-1e-05_seed-1"]


def test_cases_have_recipes_and_settings_of_their_own(
    make_sweep: MakeSweep, recipe: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {recipe}\noptimisation: {{batch_size: 8}}\n")
    cases = {"as it is": {}, "larger: 8": {"recipe": str(other), "set": ["run.keep_checkpoints=1"]}}
    sweep = make_sweep(cases=cases, set=["optimisation.epochs=1"])
    plan = make_plan(sweep)
    first, second = (plan.config(trial) for trial in plan.trials)
    assert (first.optimisation.batch_size, second.optimisation.batch_size) == (4, 8)
    assert first.optimisation.epochs == second.optimisation.epochs == 1
    assert (first.run.keep_checkpoints, second.run.keep_checkpoints) == (2, 1)
    assert second.run.name == "001_larger-8"


def test_every_trial_has_a_folder_below_the_sweeps(write_sweep: WriteSweep) -> None:
    path = write_sweep(space={RATES: {"grid": [1e-3, 1e-4]}})
    plan = make_plan(load_sweep(path))
    folders = [folder_of(plan.config(trial)).path for trial in plan.trials]
    assert len(set(folders)) == 2 and all(folder.parent == plan.folder for folder in folders)
    changed = make_plan(load_sweep(path, ["optimisation.epochs=7"]))
    assert changed.folder != plan.folder, "another sweep never resumes this one"


def test_a_planned_trial_is_found_by_its_number_a_proposed_one_by_its_point(
    make_sweep: MakeSweep,
) -> None:
    planned = make_plan(make_sweep(space={RATES: {"grid": [1e-3, 1e-4]}}))
    assert planned.trial({NUMBER: 1, POINT: {}}) is planned.trials[1]
    search = {"method": "optuna", "trials": 3}
    proposed = make_plan(make_sweep(space={RATES: {"uniform": [0.1, 0.2]}}, search=search))
    assert proposed.trials == () and proposed.searched
    assert proposed.trial({NUMBER: 7, POINT: {RATES: 0.15}}) == Trial(7, {RATES: 0.15}, 0)


def test_relative_paths_mean_the_drivers_folder_wherever_a_trial_runs(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = make_sweep(cases={"one": {"set": ["student.backbone_weights=weights/backbone"]}})
    plan = make_plan(sweep)
    here = Path.cwd()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = plan.placed(plan.config(plan.trials[0]))
    assert config.student.backbone_weights == here / "weights" / "backbone"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "nothing to sweep over"),
        ({"space": {RATES: {}}}, "needs one of grid, choice, uniform, loguniform; found none"),
        ({"space": {RATES: {"grid": [1], "choice": [1]}}}, "found grid and choice"),
        ({"space": {RATES: {"uniform": [2, 1]}}}, "the smaller one first"),
        ({"space": {RATES: {"loguniform": [0, 1]}}}, "numbers above 0"),
        ({"space": {RATES: {"choice": [1]}}}, "is no grid"),
        ({"space": {RATES: {"grid": [1], "when": {RATIO: [1]}}}}, "not above it"),
        (
            {"space": {RATIO: {"grid": [0.5, 1.0]}, RATES: {"grid": [1], "when": {RATIO: [0.7]}}}},
            r"adaptive_ratio is never 0\.7: expected values of its grid or choice, 0\.5, 1\.0",
        ),
        ({"space": {RATES: {"grid": [1]}}, "search": {"method": "optuna"}}, "make .* a choice"),
        ({"space": {RATES: {"grid": [1]}}, "search": {"trials": 3}}, "has no use for trials"),
        ({"cases": {"a": {}}, "baseline": "b"}, "baseline 'b' is none of the cases"),
        ({"cases": {"a": {"baseline": "b"}}}, "baseline 'b' is none of the cases"),
        ({"cases": {"a": {}}, "search": {"method": "random"}}, "nothing to sample"),
        ({"space": {"run.output": {"grid": [1]}}}, "changes where or how a run happens"),
        ({"space": {"optimisation.lr": {"grid": [1]}}}, "trial 'lr=1'(.|\n)*optimisation.lr"),
        ({"space": {RATES: {"grid": [0.1, -1]}}}, "trial 'learning_rate=-1'"),
        (
            {"space": {RATES: {"uniform": [-1, 1]}}, "search": {"method": "optuna", "trials": 2}},
            "greater than 0|above 0|more than 0",
        ),
        (
            {"space": {RATES: {"choice": [1]}}, "search": {"method": "population", "trials": 2}},
            "population based training is gone: use optuna",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(
    write_sweep: WriteSweep, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(load_sweep(write_sweep(**keys)))


def test_a_condition_that_is_forgotten_is_found_among_random_points(make_sweep: MakeSweep) -> None:
    # Without 'when', teacher_query_ratio would be set where nothing uses it.
    space = {RATIO: {"choice": [0.5, 1.0]}, QUERIES: {"choice": [0.5, 1.0]}}
    taught = ["distillation.method=d3etr", "teacher={weights: teacher.safetensors}"]
    search = {"method": "optuna", "trials": 5}
    with pytest.raises(ConfigError, match="adaptive_ratio=1, teacher_query_ratio"):
        make_plan(make_sweep(space=space, set=taught, search=search))
    space[QUERIES]["when"] = {RATIO: [0.5]}
    make_plan(make_sweep(space=space, set=taught, search=search))


def test_random_points_leave_out_what_does_not_apply(make_sweep: MakeSweep) -> None:
    space = {
        RATIO: {"choice": [0.5, 1.0]},
        QUERIES: {"uniform": [0.1, 1.0], "when": {RATIO: [0.5]}},
    }
    points = random_points(make_sweep(space=space, search={"method": "optuna"}), 30)
    assert {point[RATIO]: QUERIES in point for point in points} == {0.5: True, 1.0: False}


def finished(trial: Trial, mAP: float, **more: float) -> TrialResult:
    summary = {"mAP": mAP, "steps": 18, **more}
    return TrialResult(trial, "finished", Path("run"), summary, mAP, 3)


def test_the_table_groups_seeds_and_names_what_failed(make_sweep: MakeSweep) -> None:
    cases: dict[str, Any] = {"plain": {}, "taught": {}}
    sweep = make_sweep(cases=cases, baseline="plain", seeds=[0, 1])
    trials = planned_trials(sweep)
    results = [
        finished(trials[0], 0.2),
        finished(trials[1], 0.3),
        finished(trials[2], 0.22),
        TrialResult(trials[3], "failed", reason="out of memory"),
    ]
    text = table(sweep, results)
    assert "| configuration | steps | validation mAP by seed | mean | spread | gain |" in text
    assert "| plain | 18 | 20.0 / 22.0 | 21.0 | 1.4 |  |" in text
    assert "| **taught** | 18 | 30.0 / failed | 30.0 | 0.0 | +9.0 |" in text


def test_a_case_may_be_measured_against_another_than_the_rest(make_sweep: MakeSweep) -> None:
    cases: dict[str, Any] = {
        "plain": {},
        "other": {"baseline": "other"},
        "taught": {"baseline": "other"},
        "more": {},
    }
    sweep = make_sweep(cases=cases, baseline="plain")
    values = [0.2, 0.3, 0.35, 0.25]
    results = [finished(*pair) for pair in zip(planned_trials(sweep), values, strict=True)]
    gains = [line.split("|")[-2].strip() for line in table(sweep, results).splitlines()[2:]]
    assert gains == ["", "", "+5.0", "+5.0"]


def test_the_test_split_is_published_where_every_trial_has_it(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(space={RATES: {"grid": [0.1, 0.2]}})
    one, two = planned_trials(sweep)
    both = [finished(one, 0.2, **{"test/mAP": 0.1}), finished(two, 0.3, **{"test/mAP": 0.4})]
    text = table(sweep, both)
    assert "| steps | validation mAP | test/mAP by seed |" in text
    assert "| **learning_rate=0.2** | 18 | 30.0 | 40.0 | 40.0 | 0.0 |" in text
    by = "30.0 mAP on validation, by which it was chosen, 40.0 on test"
    assert best_line(sweep, both) == f"best: learning_rate=0.2: {by}"
    assert "test/mAP" not in table(sweep, [both[0], finished(two, 0.3)])


def test_a_trial_that_was_stopped_early_shows_where_it_was(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(space={RATES: {"grid": [0.1, 0.2]}})
    one, two = planned_trials(sweep)
    results = [finished(one, 0.2), TrialResult(two, "pruned", Path("run"), None, 0.05, 2)]
    assert "| learning_rate=0.2 | | stopped at epoch 2 with 5.0 | | |" in table(sweep, results)
    assert best_line(sweep, results[1:]) == ""


def test_trials_that_look_alike_are_told_apart(make_sweep: MakeSweep) -> None:
    grid = make_sweep(space={RATES: {"grid": [0.00012341, 0.00012342, 0.1]}})
    assert titles(grid) == [f"learning_rate=0.000123{n}" for n in (41, 42)] + ["learning_rate=0.1"]
    search = {"method": "random", "trials": 2}
    drawn = make_sweep(space={RATES: {"uniform": [0.1, 0.1001]}}, search=search)
    labels = [trial.label(drawn) for trial in planned_trials(drawn)]
    assert labels == ["0: learning_rate=0.1", "1: learning_rate=0.1"]
    results = [finished(trial, 0.2) for trial in planned_trials(drawn)]
    assert len(table(drawn, results).splitlines()) == 4, "a row for each"


def test_the_best_is_chosen_on_validation_among_finished_trials(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(space={RATES: {"grid": [0.1, 0.2, 0.3]}})
    one, two, three = planned_trials(sweep)
    pruned = TrialResult(three, "pruned", Path("run"), None, 0.9, 1)
    results = [finished(one, 0.3, **{"test/mAP": 0.1}), finished(two, 0.2), pruned]
    chosen = best(results)
    assert chosen is not None and chosen.trial is one
    assert best([pruned]) is None


def test_a_sweep_of_one_plan_is_the_same_in_another_process(make_sweep: MakeSweep) -> None:
    import pickle

    plan = make_plan(make_sweep(space={RATES: {"grid": [1e-3, 1e-4]}}))
    again: Plan = pickle.loads(pickle.dumps(plan))
    assert [again.config(trial) for trial in again.trials] == [
        plan.config(trial) for trial in plan.trials
    ]
