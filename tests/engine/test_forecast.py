"""A run says how long it takes from its first steps, and how far that is from what was asked."""

from pathlib import Path

import pytest
import torch
from tiny_runs import MakeConfig

from d3etr.config.training import EvaluationConfig
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.forecast import SKIPPED, STEPS, Forecast
from d3etr.engine.journal import Journal, read_journal
from d3etr.engine.run import run_training


class Course:
    """A run whose steps take as long as the test says."""

    def __init__(self, folder: Path, steps: int, minutes: float | None, first: int = 0) -> None:
        self.now, self.path = 0.0, folder / "journal.jsonl"
        journal = Journal(self.path)
        self.forecast = Forecast(journal, steps, first, 6, minutes, clock=lambda: self.now)
        self.step = first

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.forecast.begin_step()
            self.now += seconds
            self.step += 1
            self.forecast.end_step(self.step)
            self.now += 5.0  # an evaluation between steps is no part of one

    @property
    def said(self) -> list[str]:
        return [f"{r['level']}: {r['text']}" for r in read_journal(self.path)]


def test_the_first_steps_tell_how_long_all_take(tmp_path: Path) -> None:
    course = Course(tmp_path, 1500, None)
    course.steps(SKIPPED, 9.0)
    course.steps(STEPS - 1, 0.4)
    assert not course.said
    course.steps(100, 0.4)
    (line,) = course.said
    assert line.startswith("info: this run takes about 10:00: 1,500 steps of 0.4 s")
    assert "6 evaluations come on top" in line


def test_slow_steps_are_not_waited_for(tmp_path: Path) -> None:
    course = Course(tmp_path, 1500, 60.0)
    course.steps(SKIPPED + 3, 4.0)
    (line,) = course.said
    assert line.startswith("warning: this run takes about 1:40:00")
    assert "That is 40:00 more than run.minutes asks for" in line
    assert "--set optimisation.epochs=null --set optimisation.steps=900 fits" in line


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(10.0, "run.minutes asks for 10:00"), (40.0, "optimisation.steps=6000 would use it")],
)
def test_a_run_that_fits_says_so(minutes: float, text: str, tmp_path: Path) -> None:
    course = Course(tmp_path, 1500, minutes)
    course.steps(30, 0.4)
    (line,) = course.said
    assert line.startswith("info: ") and text in line


def test_long_evaluations_are_counted_once_one_is_known(tmp_path: Path) -> None:
    course = Course(tmp_path, 1500, 10.0)
    course.steps(30, 0.4)
    course.forecast.end_evaluation(30, 60.0)
    course.forecast.end_evaluation(60, 60.0)
    first, second = course.said
    assert first.startswith("info") and second.startswith("warning")
    assert "about 16:00" in second and "6 evaluations of 60.0 s counted" in second
    assert "optimisation.steps=600 fits" in second


def test_short_runs_and_resumed_ones(tmp_path: Path) -> None:
    short = Course(tmp_path, 60, None)
    short.steps(60, 0.4)
    assert not short.said
    (tmp_path / "again").mkdir()
    resumed = Course(tmp_path / "again", 1500, 1.0, first=1000)
    resumed.steps(30, 0.4)
    (line,) = resumed.said
    assert line.startswith("info: this run takes about 3:20: 500 steps") and "asks" not in line


def test_measurements_of_a_run_are_counted() -> None:
    every = EvaluationConfig(every_epochs=2)
    assert every.times(0, 100, 10) == 5 and every.times(0, 95, 10) == 5
    assert every.times(50, 100, 10) == 3
    steps = EvaluationConfig(every_epochs=1000, every_steps=30)
    assert steps.times(0, 100, 10) == 4 and steps.times(0, 90, 10) == 3


def test_a_run_that_takes_longer_than_asked_warns(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config({"epochs": 5}, {"every_epochs": 5}, run={"minutes": 1e-4}, plain=True)
    run_training(config, tmp_path, SingleProcess(torch.device("cpu")))
    texts = [r["text"] for r in read_journal(tmp_path / "journal.jsonl") if r["kind"] == "message"]
    assert any("more than run.minutes asks for" in text for text in texts)
