import time
from pathlib import Path

import pytest

from d3etr.launch import fence as fence_module
from d3etr.launch.fence import Fence
from d3etr.launch.lock import RunLock, lock_path
from d3etr.launch.notes import Notes, Reason


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reasons for which the process would have ended."""
    reasons: list[str] = []
    monkeypatch.setattr(fence_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(fence_module, "_leave", reasons.append)
    return reasons


def test_a_worker_stays_while_its_driver_holds_the_run(tmp_path: Path, left: list[str]) -> None:
    with RunLock(tmp_path) as lock, Fence(tmp_path, lock.owner.token, Notes(tmp_path)):
        time.sleep(0.2)
    assert left == []


def test_a_worker_leaves_when_another_driver_took_the_run(tmp_path: Path, left: list[str]) -> None:
    with RunLock(tmp_path), Fence(tmp_path, "another driver", Notes(tmp_path)):
        time.sleep(0.2)
    assert left and "lock" in left[0]


def test_a_worker_leaves_when_its_driver_let_go(tmp_path: Path, left: list[str]) -> None:
    with Fence(tmp_path, "gone", Notes(tmp_path)):
        time.sleep(0.2)
    assert left


def test_a_lock_that_is_being_written_drives_nobody_away(tmp_path: Path, left: list[str]) -> None:
    lock_path(tmp_path).touch()
    with Fence(tmp_path, "token", Notes(tmp_path)):
        time.sleep(0.2)
    assert left == []


def test_a_worker_that_hangs_after_a_peers_mistake_leaves(
    tmp_path: Path, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence_module, "LINGER_SECONDS", 0.1)
    notes = Notes(tmp_path)
    with RunLock(tmp_path) as lock, Fence(tmp_path, lock.owner.token, notes):
        time.sleep(0.2)
        assert left == []
        notes.end(Reason("mistake", "image 17 is truncated"))
        time.sleep(0.4)
    assert left and "hangs" in left[0]
