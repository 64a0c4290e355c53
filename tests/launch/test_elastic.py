"""Which numbers of workers an elastic run goes through; no cluster needed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import RunFailedError, UserError
from d3etr.launch import elastic, ray_failures
from d3etr.launch.control_files import ControlFiles
from d3etr.launch.elastic import train_elastically
from d3etr.launch.resources import Demand, Node


class WorkerGroupError(Exception):
    worker_failures = {0: ConnectionError("actor died")}  # noqa: RUF012


class WorkerGroupStartupTimeoutError(Exception):
    pass


class Machines:
    """A cluster of machines with one CPU each, and a group whose ends are given."""

    def __init__(self, folder: Path, cluster: ClusterConfig, ends: list[Any]) -> None:
        self.count, self.free = cluster.workers, 0.0
        self.demand = Demand(cluster.workers, 1, 0, cluster.minimum_workers)
        self.control = ControlFiles(folder)
        self.stages: list[str] = []
        self.launch = SimpleNamespace(
            config=SimpleNamespace(cluster=cluster), on_progress=self.stages.append
        )
        self.started: list[int] = []
        self._ends: Iterator[Any] = iter(ends)

    def fit(self, workers: int, failures: int, name: str, watch: Callable[[], None]) -> None:
        assert failures == 0
        self.started.append(workers)
        end = next(self._ends)
        if callable(end):
            end = end(watch)
        if end is not None:
            raise end


@pytest.fixture
def make_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machines]:
    def make(ends: list[Any], **settings: Any) -> Machines:
        cluster = ClusterConfig(**({"workers": 2, "minimum_workers": 1} | settings))
        machines = Machines(tmp_path, cluster, ends)

        def nodes() -> list[Node]:
            return [Node(1, 0)] * machines.count

        for module in (elastic, ray_failures):
            monkeypatch.setattr(module, "free_resources", lambda: Node(machines.free, 0))
        monkeypatch.setattr(elastic, "answering_nodes", nodes)
        monkeypatch.setattr(ray_failures, "cluster_nodes", nodes)
        monkeypatch.setattr(elastic, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(elastic, "WAIT_SECONDS", 0.01)
        return machines

    return make


def run(machines: Machines) -> list[int]:
    train_elastically(machines)  # type: ignore[arg-type]
    return machines.started


def test_a_lost_machine_leaves_the_rest_and_its_return_is_used(
    make_machines: Callable[..., Machines],
) -> None:
    def lose(watch: Callable[[], None]) -> Exception:
        machines.count = 1
        return WorkerGroupError()

    def grow(watch: Callable[[], None]) -> None:
        watch()
        assert not machines.control.regroup_request.exists()
        machines.count, machines.free = 2, 1.0
        for _ in range(2):
            watch()
        assert machines.control.regroup_request.exists()
        machines.control.regroup_reply.touch()

    machines = make_machines([lose, grow, None])
    assert run(machines) == [2, 1, 2]
    assert not machines.control.regroup_request.exists()
    assert any("room for 2 workers" in text for text in machines.stages)


def test_room_that_others_use_is_not_asked_for(make_machines: Callable[..., Machines]) -> None:
    def look(watch: Callable[[], None]) -> None:
        machines.count = 2
        for _ in range(5):
            watch()
        assert not machines.control.regroup_request.exists()

    machines = make_machines([look])
    machines.count = 1
    assert run(machines) == [1]


def test_workers_that_do_not_start_are_tried_as_fewer(
    make_machines: Callable[..., Machines],
) -> None:
    late = WorkerGroupStartupTimeoutError("timed out")
    machines = make_machines([late, late, None], workers=3)
    assert run(machines) == [3, 2, 1]


def test_the_least_number_that_does_not_start_is_the_users_to_solve(
    make_machines: Callable[..., Machines],
) -> None:
    late = WorkerGroupStartupTimeoutError("timed out")
    machines = make_machines([late] * 3, minimum_workers=2, maximum_failures=2)
    with pytest.raises(UserError, match="did not start within 60 seconds"):
        run(machines)
    assert machines.started == [2, 2, 2]


def test_more_losses_than_allowed_end_the_run(make_machines: Callable[..., Machines]) -> None:
    machines = make_machines([WorkerGroupError()] * 3, maximum_failures=2)
    with pytest.raises(RunFailedError, match=r"cluster.maximum_failures \(2\)"):
        run(machines)
    assert machines.started == [2, 2, 2]


def test_a_mistake_is_not_tried_again(make_machines: Callable[..., Machines]) -> None:
    machines = make_machines([UserError("image 17 is truncated")])
    with pytest.raises(UserError, match="image 17"):
        run(machines)
    assert machines.started == [2]


def test_waiting_for_the_least_number_of_machines_has_an_end(
    make_machines: Callable[..., Machines],
) -> None:
    machines = make_machines([], start_timeout_seconds=0.02, maximum_failures=1)
    machines.count = 0
    with pytest.raises(UserError, match="room for 0 of at least 1 workers"):
        run(machines)
    assert machines.started == []
