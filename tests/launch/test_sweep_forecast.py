"""A sweep says how long it takes from the first evaluation of its first trial."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sweep_runs import RATE, MakePlan

from d3etr.engine.find_run import folder_of
from d3etr.engine.journal import Journal
from d3etr.launch.sweeps import observer
from d3etr.launch.sweeps.observer import Observer
from d3etr.launch.sweeps.trials import NUMBER, POINT


def test_a_trial_that_ends_says_what_is_best_and_how_long_is_left(
    make_plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(observer.time, "monotonic", lambda: now[0])
    plan = make_plan_of(space={RATE: {"grid": [1e-4, 1e-3, 1e-2]}})
    said: list[str] = []
    watch = Observer(plan, {}, lambda text, *_: said.append(text), None, None)
    for trial, mAP in zip(plan.trials[:2], (0.3, 0.2), strict=True):
        folder = folder_of(plan.config(trial))
        folder.path.mkdir(parents=True)
        journal = Journal(folder.journal)
        journal.write("start", 0, steps=40, steps_per_epoch=4)
        journal.write("step", 4, metrics={"time/images_per_second": 81.23})
        report = {"mAP": mAP, "epoch": 1, "run_dir": str(folder.path), "final": True}
        tried: Any = SimpleNamespace(
            trial_id="a", config={NUMBER: trial.number, POINT: trial.point}, last_result=report
        )
        watch.on_trial_result(1, [], tried, report)
        folder.weights.write_bytes(b"")
        folder.write_summary({"mAP": mAP})
        now[0] += 60.0
        watch.on_trial_complete(1, [], tried)
    ends = [line for line in said if line.startswith("[")]
    assert "learning_rate=0.0001 | epoch 1 | mAP 30.0 | 81.2 images/s" in said
    first, second = "learning_rate=0.0001", "learning_rate=0.001"
    assert ends == [
        f"[1/3] {first} finished, mAP 30.0 | the best so far | about 2:00 left",
        f"[2/3] {second} finished, mAP 20.0 | best so far 30.0: {first} | about 1:00 left",
    ]


def test_the_first_evaluation_tells_how_long_all_trials_take(
    make_plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(observer.time, "monotonic", lambda: now[0])
    plan = make_plan_of(space={RATE: {"grid": [1e-4, 1e-3, 1e-2]}})
    said: list[str] = []
    watch = Observer(plan, {}, lambda text, *_: said.append(text), None, None, at_a_time=2)
    first = plan.trials[0]
    run_dir = Path(folder_of(plan.config(first)).path)
    run_dir.mkdir(parents=True)
    Journal(run_dir / "journal.jsonl").write("start", 0, steps=40, steps_per_epoch=4)
    trial: Any = SimpleNamespace(trial_id="a", config={NUMBER: first.number, POINT: first.point})
    watch.on_trial_start(1, [], trial)
    for epoch in (1, 2):
        now[0] = 30.0 * epoch
        result = {"mAP": 0.1, "epoch": epoch, "run_dir": str(run_dir), "final": False}
        watch.on_trial_result(1, [], trial, result)
    told = [line for line in said if line.startswith("about")]
    # A tenth of a run took 30 seconds; three trials are two rounds.
    assert told == ["about 10:00 for 3 trials, 2 at a time, each 5:00 if all are like this one"]
