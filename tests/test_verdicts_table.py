"""sweeps/verdicts.py: several verdicts in one table."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from d3etr.cli.verdict import COMMAND
from d3etr.verdict.contenders import make_contest

SCRIPT = Path(__file__).parents[1] / "sweeps" / "verdicts.py"
QUESTIONS = """
name: few
title: Few labels
along: labelled images
options: --minutes 2 --rates 1
verdicts:
  10 labelled: {at: 10, ask: digits/d3etr --set data.labelled_share=0.1}
  all labelled: {at: 100, ask: nowhere.yaml}
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def both(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.02}


def contender(name: str, mean: float, gain: float | None) -> dict[str, Any]:
    change = None if gain is None else {"both": both(gain), "answer": "gain"}
    return {
        "name": name,
        "distilled": name == "distilled",
        "rate": 0.5,
        "steps": 1500,
        "seconds": 91.4,
        "maps": [mean, mean + 0.01],
        "mAP": {"both": both(mean)},
        "gain": change,
    }


ANSWER = {
    "sentence": "Distilling pays.",
    "command": "d3etr verdict digits/d3etr",
    "teacher": 0.589,
    "lead": {"both": both(0.2)},
    "contenders": [contender("plain", 0.3, None), contender("distilled", 0.4, 0.1)],
}


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    file = tmp_path / "few.yaml"
    file.write_text(QUESTIONS)
    return file


def test_a_row_for_each_contender_and_a_curve(asked: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    questions = script["read_questions"](asked)
    script["write_files"](questions, {"10 labelled": ANSWER}, tmp_path / "tables", "the command")
    table = (tmp_path / "tables" / "few.md").read_text()
    plain, distilled, teacher = [line for line in table.splitlines() if "| " in line][2:]
    cells = [cell.strip() for cell in plain.split("|")][1:-1]
    assert cells[:6] == ["10 labelled", "plain", "x 0.5", "1,500", "91", "30.0 / 31.0"]
    assert cells[6:] == ["30.0", "29.0 to 32.0", "", "", "rival"]
    assert "| **distilled** |" in distilled
    assert "| **40.0** | 39.0 to 42.0 | +10.0 | +9.0 to +12.0 | gain |" in distilled
    assert "| teacher |" in teacher and "58.9, lead +20.0" in teacher
    assert "`the command`" in table and "- all labelled: failed." in table
    assert "mAP over labelled images" in table
    assert json.loads((tmp_path / "tables" / "few.json").read_text()) == {"10 labelled": ANSWER}
    assert "distilled" in (tmp_path / "tables" / "few.svg").read_text()


def test_other_distilled_students_are_held_against_the_recipes_own(
    asked: Path, tmp_path: Path
) -> None:
    script = runpy.run_path(str(SCRIPT))
    more = contender("variant", 0.41, 0.11) | {"change": {"both": both(0.011), "answer": "open"}}
    answer = ANSWER | {"contenders": [*ANSWER["contenders"], more]}
    table = script["as_markdown"](script["read_questions"](asked), {"10 labelled": answer}, "")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert "| over 'distilled' | 95 % |" in rows[0] and len({row.count("|") for row in rows}) == 1
    assert "| gain | +1.1 | +0.1 to +3.1 |" in next(row for row in rows if "variant" in row)
    assert "| gain |  |  |" in next(row for row in rows if "**distilled**" in row)


def test_the_questions_are_shown_first(asked: Path, tmp_path: Path) -> None:
    done = run(asked, "--dry-run", "--table", tmp_path / "tables")
    assert done.returncode == 0 and not (tmp_path / "tables").exists()
    asking = "d3etr verdict digits/d3etr --set data.labelled_share=0.1 --minutes 2 --rates 1"
    assert f"10 labelled: {asking}" in done.stderr


def test_a_question_that_fails_is_named(asked: Path, tmp_path: Path) -> None:
    asked.write_text(QUESTIONS.replace("digits/d3etr", "elsewhere.yaml"))
    done = run(asked, "--table", tmp_path / "tables")
    assert done.returncode == 1 and "elsewhere.yaml" in done.stderr
    assert "- 10 labelled: failed." in (tmp_path / "tables" / "few.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (QUESTIONS.replace("at: 10,", ""), "verdicts.10 labelled: expected 'at'"),
        (QUESTIONS.replace("ask: nowhere", "asks: nowhere"), "asks: unknown key"),
        (QUESTIONS.replace("nowhere.yaml", '"\'x"'), "all labelled.ask, and options"),
        (QUESTIONS.replace("at: 10,", "at: 0,"), "verdicts.10 labelled.at"),
    ],
)
def test_a_file_that_asks_nothing_is_refused(asked: Path, wrong: str, message: str) -> None:
    asked.write_text(wrong)
    done = run(asked)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_asked(asked: Path) -> None:
    done = run(asked, "--table", "/sys/tables")
    assert done.returncode == 1 and "cannot write /sys/tables" in done.stderr
    assert "d3etr verdict" not in done.stderr and "Traceback" not in done.stderr


INTERRUPTED = """
import runpy, sys
_, sys.executable, *sys.argv = sys.argv  # the second stands for a verdict
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_lets_a_verdict_end_by_itself(asked: Path, tmp_path: Path) -> None:
    verdict = tmp_path / "verdict"
    verdict.write_text(
        f"#!/bin/bash\ncd {tmp_path}\ntrap 'sleep 1; touch saved; exit 130' INT\n"
        "touch begun\nwhile true; do sleep 0.1; done\n"
    )
    verdict.chmod(0o755)
    command = [sys.executable, "-c", INTERRUPTED, str(verdict), str(SCRIPT), str(asked)]
    table = ["--table", str(tmp_path / "tables")]
    with subprocess.Popen(
        [*command, *table], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        while not (tmp_path / "begun").exists():
            assert running.poll() is None
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and (tmp_path / "saved").exists()
    assert said.endswith("interrupted: the same command goes on\n") and "Traceback" not in said


@pytest.mark.parametrize("file", sorted(SCRIPT.with_suffix("").glob("*.yaml")), ids=str)
def test_shipped_questions_can_be_asked(file: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    questions = script["read_questions"](file)
    for row in questions.verdicts:
        options = script_parser().parse_args(script["command_of"](questions, row)[1:])
        make_contest(options.recipe, options.overrides)


def script_parser() -> ArgumentParser:
    """That of ``d3etr verdict``."""
    parser = ArgumentParser()
    COMMAND.add_arguments(parser)
    return parser
