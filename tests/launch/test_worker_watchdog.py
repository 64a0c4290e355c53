import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from d3etr.engine.run_folder import RunFolder
from d3etr.launch import ray_worker
from d3etr.launch.control_files import ControlFiles, Reason
from d3etr.launch.lock import RunLock
from d3etr.launch.ray_worker import watched_by_driver


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reasons for which the process would have ended."""
    reasons: list[str] = []
    monkeypatch.setattr(ray_worker, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(ray_worker, "_exit", reasons.append)
    return reasons


def watchdog(run_dir: Path, token: str) -> AbstractContextManager[None]:
    return watched_by_driver(run_dir, token, ControlFiles(run_dir))


def test_a_worker_stays_while_its_driver_holds_the_run(tmp_path: Path, left: list[str]) -> None:
    with (
        RunLock(tmp_path) as lock,
        watchdog(tmp_path, lock.owner.token),
    ):
        time.sleep(0.2)
    assert left == []


def test_a_worker_leaves_when_another_driver_took_the_run(tmp_path: Path, left: list[str]) -> None:
    with RunLock(tmp_path), watchdog(tmp_path, "another driver"):
        time.sleep(0.2)
    assert left and "lock" in left[0]


def test_a_worker_leaves_when_its_driver_let_go(tmp_path: Path, left: list[str]) -> None:
    with watchdog(tmp_path, "gone"):
        time.sleep(0.2)
    assert left


def test_a_lock_that_is_being_written_drives_nobody_away(tmp_path: Path, left: list[str]) -> None:
    RunFolder(tmp_path).lock.touch()
    with watchdog(tmp_path, "token"):
        time.sleep(0.2)
    assert left == []


def test_a_worker_that_hangs_after_a_peers_mistake_leaves(
    tmp_path: Path, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_worker, "LINGER_SECONDS", 0.1)
    control = ControlFiles(tmp_path)
    with RunLock(tmp_path) as lock, watched_by_driver(tmp_path, lock.owner.token, control):
        time.sleep(0.2)
        assert left == []
        control.end(Reason("mistake", "image 17 is truncated"))
        time.sleep(0.4)
    assert left and "hangs" in left[0]
