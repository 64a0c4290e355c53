"""Room for trials: counted anew, waited for, but not for ever."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from d3etr.config.infrastructure import ClusterConfig
from d3etr.config.sweep import load_sweep
from d3etr.engine.journal import Journal
from d3etr.errors import UserError
from d3etr.launch.resources import Demand, Node
from d3etr.launch.sweeps import resource_timeout
from d3etr.launch.sweeps.history import curves
from d3etr.launch.sweeps.resource_timeout import ResourceTimeout
from d3etr.launch.sweeps.search import Limited, Planned, Pruning, searcher
from d3etr.launch.sweeps.trainable import limited

RATE = "optimisation.learning_rate"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still; a cluster of two CPUs."""
    now = [0.0]
    monkeypatch.setattr(resource_timeout.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resource_timeout, "cluster_nodes", lambda: [Node(2, 0)])
    monkeypatch.setattr(resource_timeout, "free_resources", lambda: Node(0, 0))
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


def test_trials_take_turns(tmp_path: Path) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def train() -> None:
        with limited(tmp_path, 2):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.3)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=train) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == ([0], [2])


def test_a_turn_of_a_process_that_was_killed_is_free_again(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path\n"
        "from d3etr.launch.sweeps.trainable import limited\n"
        "with limited(Path(sys.argv[1]), 1): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ, check=False)
    assert (tmp_path / "0" / "lock").exists()
    with limited(tmp_path, 1):
        pass


def test_a_sweep_goes_on_with_the_room_that_there_is_now(tmp_path: Path, recipe: Path) -> None:
    space = {RATE: {"uniform": [0.1, 0.2]}}
    tree = {"name": "tried", "recipe": str(recipe), "space": space}
    path = tmp_path / "sweep.yaml"
    for method, kind in (("random", Planned), ("optuna", Limited)):
        path.write_text(yaml.safe_dump(tree | {"search": {"method": method, "trials": 3}}))
        sweep = load_sweep(path)
        before, now = searcher(sweep, 8), searcher(sweep, 2)
        assert isinstance(before, kind) and isinstance(now, kind)
        now.set_state(before.get_state())
        assert now.max_concurrent == 2


def test_pruning_remembers_what_was_reported_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", 0, steps=12, steps_per_epoch=4)
    for step, mAP in ((2, 0.1), (4, 0.5), (8, 0.6)):
        journal.write("evaluation", step, metrics={"val/mAP": mAP, "epoch": step / 4})
    told = SimpleNamespace(metrics={"trial_id": "before", "run_dir": str(tmp_path)})
    assert curves([told, SimpleNamespace(metrics=None)]) == {"before": [(1, 0.5), (2, 0.6)]}

    for recalled, action in (({}, "CONTINUE"), (curves([told]), "STOP")):
        pruning = Pruning(time_attr="epoch", metric="mAP", mode="max", max_t=100)
        pruning.recall(recalled)
        trial = SimpleNamespace(trial_id="now")
        pruning.on_trial_add(None, trial)
        assert pruning.on_trial_result(None, trial, {"epoch": 1, "mAP": 0.4}) == action
