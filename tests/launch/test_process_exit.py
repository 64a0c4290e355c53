"""The end of a command's process: its code and its output, whatever hangs or breaks."""

import subprocess
import sys
import threading
import time

import pytest

from d3etr.launch import process

SCRIPT = """
import os, sys, threading, time
from d3etr.launch import process
process.EXIT_SECONDS = 0.2

def hang():
    time.sleep(600)

def command():
    {body}
    print("the result")
    return 3

{start}
"""
HOOK = "import atexit; atexit.register({}); "


def ended(body: str, start: str = "process.run_command(command)") -> tuple[int, str, float]:
    """Exit code, standard output and seconds of a process that is a command."""
    script = SCRIPT.format(body=body, start=start)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stdout, time.monotonic() - begun


@pytest.mark.parametrize("hook", ["hang", "lambda: 1 / 0", "lambda: os._exit(5)"])
@pytest.mark.parametrize(
    "body", ["assert process.skip_shutdown()", "process.attempt_within(0.2, hang)"]
)
def test_a_shutdown_that_is_skipped_changes_neither_code_nor_output(body: str, hook: str) -> None:
    code, output, seconds = ended(HOOK.format(hook) + body)
    assert (code, output) == (3, "the result\n")
    assert seconds < 20


def test_a_process_that_goes_on_shuts_down_in_order() -> None:
    assert not process.skip_shutdown()
    body = HOOK.format("print, 'shut down'") + "assert not process.skip_shutdown()"
    assert ended(body, "sys.exit(command())")[:2] == (3, "the result\nshut down\n")


def test_waiting_has_an_end() -> None:
    never = threading.Event()
    failure = process.attempt_within(0.05, never.wait)
    never.set()
    assert isinstance(failure, process.NoAnswerError)
    assert str(failure) == "no answer within 0.05 seconds"
    assert isinstance(process.attempt_within(5, lambda: 1 / 0), ZeroDivisionError)
    assert process.attempt_within(5, lambda: None) is None
