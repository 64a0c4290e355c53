"""What Ray's failures become for the user; no cluster needed."""

from pathlib import Path

import pytest

from d3etr.config.infrastructure import ClusterConfig
from d3etr.errors import UserError
from d3etr.launch import ray_cluster, ray_failures
from d3etr.launch.control_files import ControlFiles, Reason
from d3etr.launch.driver import RunFailedError
from d3etr.launch.resources import Demand, Node

CLUSTER = ClusterConfig(workers=2, maximum_failures=3, start_timeout_seconds=30.0)
DEMAND = Demand(2, 1, 0)


class WorkerGroupError(Exception):
    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = worker_failures


class ControllerError(Exception):
    def __init__(self, controller_failure: Exception) -> None:
        super().__init__("Training failed due to controller error")
        self.controller_failure = controller_failure


class WorkerGroupStartupTimeoutError(Exception):
    pass


def translate(failure: Exception, folder: Path) -> Exception:
    return ray_failures.translate(failure, CLUSTER, DEMAND, ControlFiles(folder))


def raised(error: Exception) -> Exception:
    """``error`` with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_users_mistake_in_a_worker_comes_out_as_its_text_alone(tmp_path: Path) -> None:
    try:
        try:
            raise UserError("image 17 is truncated")
        except UserError as cause:
            raise RuntimeError("worker failed") from cause
    except RuntimeError as error:
        wrapped = error
    answer = translate(WorkerGroupError({0: ConnectionError(), 1: wrapped}), tmp_path)
    assert isinstance(answer, UserError) and str(answer) == "image 17 is truncated"


class OutOfMemoryError(Exception):
    """Ray's, of which 40 lines tell the state of its object store."""


def test_a_machine_without_memory_left_is_a_sentence_with_advice(tmp_path: Path) -> None:
    error = OutOfMemoryError(
        "3 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "10.0.0.1, ID: b5ddad) was 22.47GB used / 23.54GB limit (0.954601)\nOOM kill reason: ...\n"
        "Object store memory usage: [- objects spillable: 1"
    )
    for failure in (ControllerError(error), WorkerGroupError({1: error})):
        answer = translate(failure, tmp_path)
        assert isinstance(answer, UserError)
        assert "22.47GB used / 23.54GB" in str(answer) and "accumulation" in str(answer)
        assert "object" not in str(answer)


def test_a_workers_failure_comes_with_its_own_traceback(tmp_path: Path) -> None:
    ControlFiles(tmp_path).repeats(1, raised(ZeroDivisionError("a bug")), "")
    answer = translate(WorkerGroupError({0: ConnectionError("peer"), 1: Exception("x")}), tmp_path)
    assert isinstance(answer, RunFailedError)
    assert "worker 1" in str(answer) and "test_ray_failures.py" in str(answer)
    assert "cluster.maximum_failures (3)" in str(answer)


def test_a_worker_that_left_nothing_is_still_named(tmp_path: Path) -> None:
    answer = translate(WorkerGroupError({1: ConnectionError("actor died")}), tmp_path)
    assert "worker 1" in str(answer) and "actor died" in str(answer)


def test_a_busy_cluster_is_the_users_to_solve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_failures, "cluster_nodes", lambda: [Node(4, 0)])
    monkeypatch.setattr(ray_failures, "free_resources", lambda: Node(1, 0))
    answer = translate(ControllerError(WorkerGroupStartupTimeoutError("timed out")), tmp_path)
    assert isinstance(answer, UserError)
    for part in ("2 workers with 1 CPU each", "30 seconds", "4 CPUs", "1 CPUs", "4 times"):
        assert part in str(answer)


def test_a_node_without_the_package_is_named(tmp_path: Path) -> None:
    said = (
        "ray::TrainController.run() (pid=1, ip=10.77.0.1, actor_id=cd)\n"
        "ray::RayTrainWorker.init_train_context() (pid=7, ip=10.77.0.2, actor_id=ab)\n"
        "ray.exceptions.RaySystemError: System error: No module named 'd3etr'"
    )
    answer = translate(ControllerError(RuntimeError(said)), tmp_path)
    assert isinstance(answer, UserError)
    assert str(answer).startswith("the node 10.77.0.2 cannot import 'd3etr'")
    assert "--working-dir" in str(answer)


def test_any_other_failure_is_named(tmp_path: Path) -> None:
    answer = translate(ControllerError(OSError("disk")), tmp_path)
    assert isinstance(answer, RunFailedError) and "OSError: disk" in str(answer)


def test_the_first_reason_stays(tmp_path: Path) -> None:
    control = ControlFiles(tmp_path)
    assert control.reason() is None
    control.end(Reason("mistake", "cause"))
    control.end(Reason("failure", "consequence"))
    assert control.reason() == Reason("mistake", "cause")


def test_an_exception_comes_back_only_unchanged_and_without_progress(tmp_path: Path) -> None:
    control, bug = ControlFiles(tmp_path), raised(ValueError("bug"))
    assert not control.repeats(0, bug, "step-6")
    assert not control.repeats(1, bug, "step-6")
    assert control.repeats(0, bug, "step-6")
    assert not control.repeats(0, bug, "step-12")
    assert not control.repeats(0, raised(ValueError("other")), "step-12")


def test_a_refused_token_says_what_to_set() -> None:
    class AuthenticationError(Exception):
        pass

    text = ray_cluster._explanation("10.0.0.1:6379", AuthenticationError("401"))
    assert "RAY_AUTH_MODE=token" in text and "10.0.0.1:6379" in text
