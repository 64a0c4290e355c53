import io
import re

import pytest
from rich.console import Console

from d3etr.engine.journal import Record
from d3etr.launch.display import Bar, Display, Lines, open_display
from d3etr.progress import PacedProgress, duration

EPOCH = 10


def start(step: int = 0, time: float = 0.0) -> Record:
    return {"kind": "start", "step": step, "time": time, "steps": 40, "steps_per_epoch": EPOCH}


def step(number: int) -> Record:
    metrics = {"train/loss": 5.0 - number / 10, "time/images_per_second": 80.0}
    return {"kind": "step", "step": number, "time": float(number), "metrics": metrics}


def evaluation(number: int) -> Record:
    metrics = {"val/mAP": 0.25, "val/AP50": 0.5, "epoch": 1}
    return {"kind": "evaluation", "step": number, "time": float(number), "metrics": metrics}


def lines_of(*records: Record) -> list[str]:
    stream = io.StringIO()
    display = Lines(stream)
    for record in records:
        display.consume(record)
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines), "each has its time"
    return [line[9:] for line in lines]


def test_an_evaluation_is_a_readable_line_in_percent() -> None:
    lines = lines_of(start(), step(10), evaluation(10))
    assert lines == [
        "training 40 steps, 10 an epoch",
        "epoch 1/4 | step 10/40 | loss 4.000 | mAP 25.0  AP50 50.0 | 80 images/s | 0:30 left",
    ]


def test_an_epoch_without_evaluation_has_its_line_too() -> None:
    lines = lines_of(start(), step(5), step(10), step(15), step(20), step(25))
    assert [line.split(" | ")[1] for line in lines[1:]] == ["step 15/40", "step 25/40"]


def test_a_resumed_run_says_where_it_goes_on() -> None:
    assert lines_of(start(20)) == ["going on from the checkpoint at step 20 of 40"]


def test_a_second_start_is_told_as_an_interruption() -> None:
    lines = lines_of(start(), step(15), start(10))
    assert lines[-1] == "training was interrupted; going on from step 10 of 40"


def test_warnings_are_shown_and_marked() -> None:
    message = {"kind": "message", "step": 0, "text": "3 boxes dropped", "level": "warning"}
    assert lines_of(message) == ["warning: 3 boxes dropped"]


def test_the_bar_shows_steps_loss_and_accuracy() -> None:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=120))
    for record in (start(), step(10), evaluation(10)):
        bar.consume(record)
    bar.close()
    shown = stream.getvalue()
    assert "10/40" in shown and "loss 4.000" in shown and "mAP 25.0" in shown


def test_a_name_in_brackets_is_no_markup() -> None:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=120))
    bar.consume({"kind": "message", "step": 0, "text": "file [red].png"})
    bar.close()
    assert "file [red].png" in stream.getvalue()


def test_the_display_fits_its_place() -> None:
    assert isinstance(open_display(stream=io.StringIO()), Lines)
    assert type(open_display(quiet=True)) is Display


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (5.4, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_quiet_leaves_out_progress_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    quiet = open_display(quiet=True)
    for level in ("info", "warning"):
        quiet.consume({"kind": "message", "step": 0, "level": level, "text": f"an {level}"})
    quiet.consume({"kind": "evaluation", "step": 1, "metrics": {"val/mAP": 0.5}})
    assert caplog.messages == ["warning: an warning"]


def test_long_work_says_now_and_then_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("d3etr.progress.time.monotonic", lambda: now[0])
    progress = PacedProgress(lines.append, first=2.0, every=10.0)
    for now[0] in range(25):
        progress("images", int(100 * now[0]), 2500)
    progress("waiting")
    assert lines == [
        "images: 200 of 2,500, 0:23 left",
        "images: 1,200 of 2,500, 0:13 left",
        "images: 2,200 of 2,500, 0:03 left",
    ]
