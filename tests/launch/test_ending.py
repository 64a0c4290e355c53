"""The end of a command's process: its code and its words, whatever hangs or breaks."""

import subprocess
import sys
import threading
import time

import pytest

from d3etr.launch import ending

SCRIPT = """
import os, sys, threading, time
from d3etr.launch import ending
ending.END_SECONDS = 0.2

def hang():
    time.sleep(600)

def command():
    assert {kept} == ending.at_the_end({action})
    {also}
    print("the result")
    return 3

{start}
"""


def ended(
    action: str, start: str = "ending.program(command)", also: str = ""
) -> tuple[int, str, float]:
    """Exit code, standard output and seconds of a process that is a command."""
    script = SCRIPT.format(action=action, start=start, also=also, kept="program" in start)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stdout, time.monotonic() - begun


@pytest.mark.parametrize("action", ["hang", "lambda: 1 / 0", "lambda: os._exit(3)", "sys.exit"])
def test_what_is_done_last_changes_neither_code_nor_words(action: str) -> None:
    code, said, seconds = ended(action)
    assert (code, said) == (3, "the result\n")
    assert seconds < 20


def test_nothing_is_left_to_the_end_of_a_process_that_goes_on() -> None:
    assert not ending.at_the_end(lambda: None)
    assert ended("hang", "sys.exit(command())")[:2] == (3, "the result\n")


def test_python_does_not_end_in_order_around_a_thread_that_hangs() -> None:
    also = "import atexit; atexit.register(hang); ending.attempt_within(0.2, hang)"
    code, said, seconds = ended("hang", also=also)
    assert (code, said) == (3, "the result\n")
    assert seconds < 20


def test_waiting_has_an_end() -> None:
    never = threading.Event()
    failure = ending.attempt_within(0.05, never.wait)
    never.set()
    assert isinstance(failure, ending.NoAnswerError)
    assert str(failure) == "no answer within 0.05 seconds"
    assert isinstance(ending.attempt_within(5, lambda: 1 / 0), ZeroDivisionError)
    assert ending.attempt_within(5, lambda: None) is None
