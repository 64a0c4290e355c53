import io
import re
import time
from pathlib import Path

import pytest

from d3etr.launch.console import Lines
from d3etr.launch.follower import JournalFollower, OnceOnly
from d3etr.training.journal import Journal, Record


class Recorder:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def consume(self, record: Record) -> None:
        self.records.append(record)

    @property
    def steps(self) -> list[tuple[str, int]]:
        return [(record["kind"], record["step"]) for record in self.records]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + 5
        while len(self.records) < count and time.monotonic() < end:
            time.sleep(0.01)
        assert len(self.records) >= count


class Broken:
    def consume(self, record: Record) -> None:
        raise OSError("the tracking server is gone")


def write_steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.write("step", step, metrics={"train/loss": 1.0 / step})


def test_everything_written_before_stop_is_passed_on(tmp_path: Path) -> None:
    journal, console, tracker = Journal(tmp_path / "j"), Recorder(), Recorder()
    follower = JournalFollower(journal.path, console, tracker)
    follower.start()
    write_steps(journal, 1, 50)
    follower.stop()
    assert tracker.steps == console.steps == [("step", step) for step in range(1, 51)]


def test_the_tracker_gets_the_whole_journal_and_the_console_what_is_new(tmp_path: Path) -> None:
    journal, console, tracker = Journal(tmp_path / "j"), Recorder(), Recorder()
    write_steps(journal, 1, 3)
    follower = JournalFollower(journal.path, console, tracker)
    follower.start()
    write_steps(journal, 4, 5)
    follower.stop()
    assert [step for _, step in tracker.steps] == [1, 2, 3, 4, 5]
    assert [step for _, step in console.steps] == [4, 5]


def test_no_step_is_tracked_twice_when_a_resume_cuts_the_journal_back(tmp_path: Path) -> None:
    journal, console, tracker = Journal(tmp_path / "j"), Recorder(), Recorder()
    follower = JournalFollower(journal.path, console, tracker)
    follower.start()
    write_steps(journal, 1, 6)
    tracker.wait_for(6)
    journal.cut_back(4)
    write_steps(journal, 5, 9)
    follower.stop()
    assert [step for _, step in tracker.steps] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [step for _, step in console.steps][-5:] == [5, 6, 7, 8, 9]


def test_kinds_are_counted_apart_and_messages_always_pass() -> None:
    tracker = Recorder()
    once = OnceOnly(tracker)
    message = {"kind": "message", "step": 4, "text": "hello"}
    for kind in ("step", "evaluation", "step"):
        once.consume({"kind": kind, "step": 4, "metrics": {}})
    once.consume(message)
    once.consume(message)
    assert [kind for kind, _ in tracker.steps] == ["step", "evaluation", "message", "message"]


def test_a_broken_tracker_is_one_warning_and_the_console_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, console = Journal(tmp_path / "j"), Recorder()
    follower = JournalFollower(journal.path, console, Broken())
    follower.start()
    write_steps(journal, 1, 5)
    follower.stop()
    assert len(console.records) == 5
    assert [record.getMessage().count("training is not affected") for record in caplog.records] == [
        1
    ]
    assert "the tracking server is gone" in caplog.text


def test_a_broken_console_does_not_stop_tracking(tmp_path: Path) -> None:
    journal, tracker = Journal(tmp_path / "j"), Recorder()
    follower = JournalFollower(journal.path, Broken(), tracker)
    follower.start()
    write_steps(journal, 1, 5)
    follower.stop()
    assert len(tracker.records) == 5


def test_a_run_without_a_journal_has_nothing_to_pass_on(tmp_path: Path) -> None:
    tracker = Recorder()
    follower = JournalFollower(tmp_path / "none", tracker, tracker)
    follower.start()
    follower.stop()
    assert tracker.records == []


def test_a_clock_that_is_set_back_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, tracker, stream = Journal(tmp_path / "j"), Recorder(), io.StringIO()
    journal.write("step", 1)
    follower = JournalFollower(journal.path, Lines(stream), tracker)
    follower.start()
    journal.write("start", 1, steps=40, steps_per_epoch=10)
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall - 3600)
    time.sleep(0.1)
    journal.write("evaluation", 11, metrics={"val/mAP": 0.25})
    follower.stop()
    assert [step for _, step in tracker.steps] == [1, 1, 11]
    going_on, evaluated = stream.getvalue().splitlines()
    assert going_on == "going on from the checkpoint at step 1 of 40"
    assert "step 11/40" in evaluated and evaluated.endswith(" left")
    assert re.search(r"\| 0:0\d left$", evaluated), "29 steps at 10 in a tenth of a second"
