"""What a sweep waits for, and what it remembers of an earlier start."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_runs import RATE, MakePlan

from d3etr.config.infrastructure import ClusterConfig
from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import Journal
from d3etr.errors import UserError
from d3etr.launch.resources import Demand, Node
from d3etr.launch.sweeps import observer
from d3etr.launch.sweeps.observer import ResourceTimeout
from d3etr.launch.sweeps.results import TrialResult, curve_of, ended_before, keep_as_pruned
from d3etr.launch.sweeps.search import Pruning, TrialSource, known_trials, open_study
from d3etr.launch.sweeps.trials import NUMBER, POINT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still; a cluster of two CPUs."""
    now = [0.0]
    monkeypatch.setattr(observer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(observer, "cluster_nodes", lambda: [Node(2, 0)])
    monkeypatch.setattr(observer, "free_resources", lambda: Node(0, 0))
    return now


def test_a_sweep_that_waits_for_room_says_so_and_ends_in_time(clock: list[float]) -> None:
    said: list[str] = []
    cluster = ClusterConfig(maximum_failures=1, start_timeout_seconds=10)
    watch = ResourceTimeout(cluster, Demand(1, 1, 0), said.append)
    for clock[0] in (5, 11, 12):
        watch.check(["TERMINATED", "PENDING"])
    (line,) = said
    assert line.startswith("no room for a trial (1 worker with 1 CPU): the cluster has 2 CPUs")
    assert "0 CPUs and 0 GPUs are free; waiting" in line
    clock[0] = 21
    with pytest.raises(UserError, match=r"since 20 seconds.*the same command goes on"):
        watch.check(["PENDING"])


@pytest.mark.parametrize("states", [["RUNNING", "PENDING"], ["PAUSED", "TERMINATED"], []])
def test_a_sweep_whose_trials_train_is_not_waiting(clock: list[float], states: list[str]) -> None:
    watch = ResourceTimeout(ClusterConfig(), Demand(1, 1, 0), lambda line: None)
    for clock[0] in range(0, 1000, 100):
        watch.check(states)
    clock[0] += 100
    watch.check(["PENDING"])


def report(run_dir: Path, *curve: float) -> None:
    """A journal of a run of four steps an epoch, measured within the first and after each."""
    run_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("start", 0, steps=12, steps_per_epoch=4)
    journal.write("evaluation", 2, metrics={"val/mAP": 0.1, "epoch": 0.5})
    for epoch, mAP in enumerate(curve, 1):
        journal.write("evaluation", 4 * epoch, metrics={"val/mAP": mAP, "epoch": epoch})


def test_pruning_remembers_what_was_reported_before(make_plan_of: MakePlan, tmp_path: Path) -> None:
    plan = make_plan_of(space={RATE: {"grid": [1e-3, 1e-4]}}, pruning={"reduction": 2})
    report(tmp_path, 0.5, 0.6)
    assert curve_of(tmp_path) == [(1, 0.5), (2, 0.6)]
    before = TrialResult(plan.trials[0], "finished", tmp_path)
    for ended, action in (([], "CONTINUE"), ([before], "STOP")):
        pruning = Pruning(plan, ended)
        pruning.set_search_properties("mAP", "max")
        trial = SimpleNamespace(trial_id="now", config={NUMBER: 1})
        pruning.on_trial_add(None, trial)
        assert pruning.on_trial_result(None, trial, {"epoch": 1, "mAP": 0.4}) == action


def test_what_ended_before_needs_no_training(make_plan_of: MakePlan) -> None:
    plan = make_plan_of(space={RATE: {"grid": [1e-3, 1e-4]}})
    stopped = folder_of(plan.config(plan.trials[1])).path
    report(stopped, 0.2, 0.3)
    assert ended_before(plan, plan.trials) == {}
    result = keep_as_pruned(plan, plan.trials[1], stopped)
    assert (result.state, result.epoch, result.mAP) == ("pruned", 2, 0.3)
    ended = ended_before(plan, plan.trials)
    assert ended == {1: result}
    source = TrialSource(plan, None, ended.values())
    assert source.remaining == 1
    assert source.suggest("first") == {NUMBER: 0, POINT: {RATE: 1e-3}}


def test_a_search_goes_on_where_it_was_interrupted(make_plan_of: MakePlan) -> None:
    space = {RATE: {"loguniform": [1e-4, 1e-2]}, "optimisation.batch_size": {"choice": [4, 8]}}
    plan = make_plan_of(space=space, search={"method": "optuna", "trials": 4, "startup_trials": 4})
    plan.folder.mkdir(parents=True)
    source = TrialSource(plan, open_study(plan), [])
    first, second = source.suggest("first"), source.suggest("second")
    source.on_trial_complete("first", {"mAP": 0.4})
    source.on_trial_complete("second", {"mAP": float("nan"), "reason": "out of memory"})

    study = open_study(plan)
    assert study is not None and study.best_value == 0.4
    known = known_trials(plan, study)
    assert [trial.point for trial in known] == [first[POINT], second[POINT]]
    again = TrialSource(plan, study, [TrialResult(known[0], "finished", mAP=0.4)])
    assert again.remaining == 3
    given = [again.suggest(name) for name in ("second", "third", "fourth")]
    assert given[0] == second, "what failed is tried again"
    assert [one[NUMBER] for one in given] == [1, 2, 3]
    assert len({one[POINT][RATE] for one in (first, *given)}) == 4


def test_a_search_whose_memory_is_damaged_or_older_asks_to_remove_it(
    make_plan_of: MakePlan,
) -> None:
    search = {"method": "optuna", "trials": 2}
    plan = make_plan_of(space={RATE: {"uniform": [0.1, 0.2]}}, search=search)
    (plan.folder / "tune").mkdir(parents=True)
    with pytest.raises(UserError, match="begun by an earlier version"):
        open_study(plan)
    (plan.folder / "search.log").write_text("damaged\nmore\n")
    with pytest.raises(UserError, match=r"search\.log is damaged"):
        open_study(plan)
