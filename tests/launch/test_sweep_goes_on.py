"""A sweep's own keys on the command line, searches that get more trials, what they found."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from sweep_runs import RATE, MakePlan

from d3etr.cli.main import main
from d3etr.config.load import config_digest
from d3etr.config.problems import ConfigError
from d3etr.launch.sweeps.importance import importance_line, importances
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, as_json, write_sweep
from d3etr.launch.sweeps.search import TrialSource, known_trials, open_study
from d3etr.launch.sweeps.trials import NUMBER, Trial, random_points

SPACE = {RATE: {"loguniform": [1e-4, 1e-2]}, "optimisation.batch_size": {"choice": [4, 8]}}


def search(trials: int) -> dict[str, object]:
    return {"method": "optuna", "trials": trials, "startup_trials": 3}


def test_more_trials_go_on_with_the_same_study(make_plan_of: MakePlan) -> None:
    plan = make_plan_of(space=SPACE, search=search(3))
    plan.folder.mkdir(parents=True)
    source = TrialSource(plan, open_study(plan), ())
    for number in range(source.remaining):
        assert source.suggest(f"t{number}")[NUMBER] == number
        source.on_trial_complete(f"t{number}", {"mAP": 0.1 * number, "final": True})

    more = make_plan_of("search.trials=5", space=SPACE, search=search(3))
    assert more.folder == plan.folder and more.sweep.search.trials == 5
    study = open_study(more)
    known = known_trials(more, study)
    ended = [TrialResult(trial, "finished", None, {}, 0.1 * trial.number) for trial in known]
    again = TrialSource(more, study, ended)
    assert again.remaining == 2
    assert [again.suggest(name)[NUMBER] for name in ("a", "b")] == [3, 4]
    assert make_plan_of(space=SPACE, search=search(3) | {"seed": 1}).folder != plan.folder


def test_a_search_of_an_earlier_version_is_found_with_more_trials(make_plan_of: MakePlan) -> None:
    """Its folder's name has the number of trials in the digest."""
    plan = make_plan_of(space=SPACE, search=search(3))
    shown = {"title": True, "maximum_concurrent": True, "baseline": True}
    tree = plan.sweep.model_dump(mode="json", exclude=shown)
    tree["search"]["perturb_every_epochs"] = 1
    configs = sorted({config_digest(plan.config(trial)) for trial in plan.examples()})
    digest = hashlib.sha256(json.dumps([tree, configs], sort_keys=True).encode()).hexdigest()[:8]
    before = plan.folder.parent / f"tried-{digest}"
    before.mkdir(parents=True)
    assert make_plan_of("search.trials=9", space=SPACE, search=search(3)).folder == before


def test_a_sweeps_own_keys_are_set_on_the_command_line(
    make_plan_of: MakePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan_of(space=SPACE, search=search(3))
    sets = ["--set", "search.trials=7", "--set", "optimisation.epochs=2"]
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--dry-run", *sets]) == 0
    assert "7 trials, proposed by 'optuna'" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"search\.trails"):
        make_plan_of("search.trails=7", space=SPACE, search=search(3))

    plan.folder.mkdir(parents=True)
    write_sweep(plan)
    resumed = ["sweep", "--resume", str(plan.folder), "--dry-run"]
    assert main([*resumed, "--set", "search.trials=9"]) == 0
    assert "9 trials, proposed by" in capsys.readouterr().out
    assert main([*resumed, "--set", "optimisation.epochs=2"]) == 2
    assert "keeps the recipe that it began with" in capsys.readouterr().err


def tried(plan: Plan, state: str = "finished") -> list[TrialResult]:
    """Trials whose mAP is that of the learning rate alone; the worse half has ``state``."""
    points = random_points(plan.sweep, 24)
    middle = sorted(point[RATE] for point in points)[12]
    return [
        TrialResult(
            Trial(number, point, 0),
            "finished" if point[RATE] >= middle else state,  # type: ignore[arg-type]
            Path("run"),
            {"mAP": 30 * point[RATE]},
            30 * point[RATE] + random.Random(number).uniform(0, 1e-3),
            1,
        )
        for number, point in enumerate(points)
    ]


def test_importance_counts_trials_that_were_stopped_early(make_plan_of: MakePlan) -> None:
    sweep = (plan := make_plan_of(space=SPACE, search=search(24))).sweep
    results = tried(plan, "pruned")
    found = importances(sweep, results)
    assert found["learning_rate"] > 0.8 and sum(found.values()) == pytest.approx(1, abs=0.01)
    assert importance_line(sweep, results).endswith("(24 trials, 12 stopped early)")
    assert as_json(sweep, results, "command")["importance"] == found
    without = importances(sweep, [r for r in results if r.state == "finished"])
    assert found != without, "they count"


def test_importance_is_not_made_up(make_plan_of: MakePlan) -> None:
    sweep = (plan := make_plan_of(space=SPACE, search=search(24))).sweep
    assert importances(sweep, tried(plan)[:7]) == {}, "too few"
    ended = tried(plan, "failed")
    few = [r for r in ended if r.state == "failed"] + [r for r in ended if r.state != "failed"][:7]
    assert importances(sweep, few) == {}, "too few that have an mAP"
    one = make_plan_of(space={RATE: SPACE[RATE]}, search=search(24))
    assert importances(one.sweep, tried(one)) == {}, "one key is all there is"
