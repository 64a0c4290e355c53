import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch import lock as lock_module
from d3etr.launch.lock import Owner, RunLock, RunLockedError, read_owner

HOLD = """
import sys, time
from pathlib import Path
from d3etr.launch.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def write_lock(run_dir: Path, owner: Owner, seconds_ago: float = 0) -> None:
    RunFolder(run_dir).lock.write_text(json.dumps(asdict(owner)))
    touched = time.time() - seconds_ago
    os.utime(RunFolder(run_dir).lock, (touched, touched))


def hold(run_dir: Path) -> subprocess.Popen[str]:
    source = str(Path(lock_module.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source},
    )


def elsewhere() -> Owner:
    return replace(Owner.this_process(), host="another-machine")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock_module, "SILENT_SECONDS", 0.5)


def test_the_lock_is_there_while_held_and_gone_afterwards(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert read_owner(RunFolder(tmp_path).lock) == lock.owner
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_keeps_its_lock_and_is_named(tmp_path: Path) -> None:
    with hold(tmp_path) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=rf"process {holder.pid} on .*since \d{{4}}-"):
            RunLock(tmp_path).__enter__()
        assert read_owner(RunFolder(tmp_path).lock) is not None
        holder.kill()


def test_the_text_says_what_to_do(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunLockedError) as caught:
        RunLock(tmp_path).__enter__()
    text = str(caught.value)
    assert "--set run.name=NAME" in text and f"remove {RunFolder(tmp_path).lock}" in text


def test_the_lock_of_a_killed_process_is_taken_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(tmp_path) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.kill()
    with RunLock(tmp_path) as lock:
        assert read_owner(RunFolder(tmp_path).lock) == lock.owner
    assert f"process {holder.pid}" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_lock(
    tmp_path: Path,
) -> None:
    owner = Owner.this_process()
    write_lock(tmp_path, replace(owner, process=owner.process + "0"))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("set_by", [-3600, 0, 3600])
def test_an_owner_elsewhere_is_alive_while_its_heart_beats_whatever_clocks_say(
    tmp_path: Path, set_by: int
) -> None:
    write_lock(tmp_path, elsewhere(), seconds_ago=set_by)
    beats = iter(range(1, 1000))

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(RunFolder(tmp_path).lock, (0, time.time() - set_by + next(beats)))

    ended = threading.Event()
    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunLockedError, match="another-machine"):
            RunLock(tmp_path).__enter__()
    finally:
        ended.set()
        heart.join()


@pytest.mark.parametrize("set_by", [-3600, 0, 3600])
def test_the_lock_of_a_silent_owner_elsewhere_is_taken_over(tmp_path: Path, set_by: int) -> None:
    write_lock(tmp_path, elsewhere(), seconds_ago=set_by)
    with RunLock(tmp_path):
        pass


def test_a_lock_that_is_just_being_written_is_left_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path).lock.touch()
    writer = threading.Timer(0.2, lambda: write_lock(tmp_path, elsewhere()))
    writer.start()
    with pytest.raises(RunLockedError, match="owner not readable yet"):
        RunLock(tmp_path).__enter__()
    writer.join()


def test_a_fresh_lock_that_was_moved_aside_by_mistake_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the dead lock over between our look and our move."""
    write_lock(tmp_path, elsewhere())
    dead = replace(elsewhere(), token="dead")
    monkeypatch.setattr(RunLock, "_dead_owner", lambda self: dead)
    with pytest.raises(RunLockedError, match="another-machine"):
        RunLock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_that_does_not_fit_on_the_disk_says_so_and_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, Path("/dev/full").open("w") as full:
        opened = os.open

        def open_full(path: Path, flags: int, mode: int = 0o777) -> int:
            os.close(opened(path, flags, mode))
            return os.dup(full.fileno())

        patched.setattr(lock_module.os, "open", open_full)
        with pytest.raises(UserError, match=rf"no space left: the run's lock .* {tmp_path}"):
            RunLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    with RunLock(tmp_path):
        os.utime(RunFolder(tmp_path).lock, (0, 0))
        end = time.monotonic() + 5
        while RunFolder(tmp_path).lock.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert RunFolder(tmp_path).lock.stat().st_mtime > 0


def test_losing_the_lock_interrupts_the_run_and_leaves_the_new_owners_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.02)
    lock = RunLock(tmp_path)
    with pytest.raises(KeyboardInterrupt), lock:
        write_lock(tmp_path, elsewhere())
        time.sleep(5)
    assert lock.lost
    owner = read_owner(RunFolder(tmp_path).lock)
    assert owner is not None and owner.host == "another-machine"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"token": 1}', "[" * 9999, '{"pid": "1", "since": null}']
)
def test_a_damaged_lock_is_nobodys_and_is_taken_over(tmp_path: Path, content: str) -> None:
    written = asdict(elsewhere())
    if content.startswith("{"):
        content = json.dumps(written | json.loads(content))
    RunFolder(tmp_path).lock.write_text(content)
    assert read_owner(RunFolder(tmp_path).lock) is None
    with RunLock(tmp_path) as lock:
        assert read_owner(RunFolder(tmp_path).lock) == lock.owner
