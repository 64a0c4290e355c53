import pytest

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch.resources import Demand, Node, demand_of, ensure_room, room, threads_for

CPUS = [Node(2, 0)]
MIXED = [Node(8, 2), Node(4, 0)]


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "expected"),
    [
        (CPUS, 1, 0, 2),
        (CPUS, 0.5, 0, 4),
        (CPUS, 3, 0, 0),
        (MIXED, 1, 1, 2),
        (MIXED, 5, 0, 1),
        ([Node(9, 1)], 1, 1 / 3, 3),
        ([Node(1, 4)], 1, 1, 1),
        ([], 1, 0, 0),
    ],
)
def test_room_counts_whole_workers_per_machine(
    nodes: list[Node], cpus: float, gpus: float, expected: int
) -> None:
    assert room(nodes, cpus, gpus) == expected


def test_auto_takes_gpus_where_each_worker_gets_one() -> None:
    assert demand_of(ClusterConfig(workers=2), MIXED) == Demand(2, 1.0, 1.0)
    assert demand_of(ClusterConfig(workers=2), CPUS) == Demand(2, 1.0, 0.0)


def test_gpus_that_stay_idle_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert demand_of(ClusterConfig(workers=3), MIXED).gpus == 0.0
    assert "12 CPUs and 2 GPUs on 2 nodes" in caplog.text


def test_too_few_gpus_say_what_is_there_and_what_was_asked() -> None:
    with pytest.raises(UserError) as caught:
        ensure_room(Demand(4, 1, 1), MIXED)
    text = str(caught.value)
    assert "12 CPUs and 2 GPUs on 2 nodes" in text
    assert "4 workers with 1 CPU and 1 GPU each" in text
    assert "there is room for 2" in text and "cluster.workers=2" in text


def test_an_elastic_run_needs_room_for_its_minimum() -> None:
    demand = Demand(4, 1, 1, 2)
    ensure_room(demand, MIXED)
    assert str(demand) == "2 to 4 workers with 1 CPU and 1 GPU each"
    with pytest.raises(UserError, match=r"cluster\.minimum_workers=2"):
        ensure_room(Demand(4, 1, 1, 3), MIXED)
    assert demand_of(ClusterConfig(workers=4, minimum_workers=2), MIXED).gpus == 1.0


def test_no_room_at_all_asks_for_less() -> None:
    with pytest.raises(UserError, match="room for none"):
        ensure_room(Demand(1, 16, 0), CPUS)


def test_what_fits_is_not_refused() -> None:
    ensure_room(Demand(2, 1, 0), CPUS)


@pytest.mark.parametrize(
    ("configured", "wish", "expected"), [(3, "1", 3), ("auto", "1", 1), ("auto", "x", 4)]
)
def test_threads_follow_the_configuration_then_the_drivers_wish(
    configured: int, wish: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3etr.launch.resources.usable_cores", lambda: 8)
    cluster = ClusterConfig.model_validate({"threads_per_worker": configured})
    assert threads_for(cluster, 2, wish) == expected
