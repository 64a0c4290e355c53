import io
import re
import time
from pathlib import Path

import pytest

from d3etr.engine.journal import Journal, Record
from d3etr.launch.display import Display, JournalFollower, Lines


class Recorder(Display):
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


class Broken(Display):
    def consume(self, record: Record) -> None:
        raise OSError("the terminal is gone")


def write_steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.write("step", step, metrics={"train/loss": 1.0 / step})


def follow(journal: Journal, console: Display) -> JournalFollower:
    follower = JournalFollower(journal.path, console)
    follower.start()
    return follower


def test_everything_written_between_start_and_stop_is_shown(tmp_path: Path) -> None:
    journal, console = Journal(tmp_path / "j"), Recorder()
    write_steps(journal, 1, 3)
    follower = follow(journal, console)
    write_steps(journal, 4, 50)
    follower.stop()
    assert console.steps == [("step", step) for step in range(4, 51)]


def test_what_a_resume_repeats_is_shown_again(tmp_path: Path) -> None:
    journal, console = Journal(tmp_path / "j"), Recorder()
    follower = follow(journal, console)
    write_steps(journal, 1, 6)
    console.wait_for(6)
    journal.cut_back(4)
    write_steps(journal, 5, 9)
    follower.stop()
    assert [step for _, step in console.steps] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]


def test_a_broken_display_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "j")
    follower = follow(journal, Broken())
    write_steps(journal, 1, 5)
    follower.stop()
    assert [record.getMessage().count("training is not affected") for record in caplog.records] == [
        1
    ]
    assert "the terminal is gone" in caplog.text


def test_a_run_without_a_journal_has_nothing_to_show(tmp_path: Path) -> None:
    console = Recorder()
    follow(Journal(tmp_path / "none"), console).stop()
    assert console.records == []


def test_a_clock_that_is_set_back_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, stream = Journal(tmp_path / "j"), io.StringIO()
    journal.write("step", 1)
    follower = follow(journal, Lines(stream))
    journal.write("start", 1, steps=40, steps_per_epoch=10)
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall - 3600)
    time.sleep(0.1)
    journal.write("evaluation", 11, metrics={"val/mAP": 0.25})
    follower.stop()
    going_on, evaluated = (line[9:] for line in stream.getvalue().splitlines())  # behind the time
    assert going_on == "going on from the checkpoint at step 1 of 40"
    assert "step 11/40" in evaluated and evaluated.endswith(" left")
    assert re.search(r"\| 0:0\d left$", evaluated), "29 steps at 10 in a tenth of a second"
