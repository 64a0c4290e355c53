"""Signals at any moment end a command with one code and one sentence, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.launch.process import held, stop_requested, terminable
from d3etr.launch.ray_environment import package_environment

assert ray  # brings psutil
import psutil  # type: ignore[import-untyped]  # noqa: E402

MakeConfig = Callable[..., Config]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
COMMAND = """
import sys, time
from d3etr.launch import process
process.ECHO_SECONDS = float(sys.argv[1])

def ready():
    print("ready", flush=True)

def command():
    {body}
    return 0

process.run_command(command)
"""
WAITS = "ready(); time.sleep(60)"
HOLDS = "with process.held():\n        ready(); time.sleep(1); print('whole')\n    time.sleep(60)"
HANGS = "with process.held():\n        ready(); time.sleep(60)"
CLOSES = (
    "try:\n        ready(); time.sleep(60)\n    finally:\n        time.sleep(1); print('closed')"
)
IN_EXEC = "exec('ready(); time.sleep(60)')"


def started(body: str, echo: float = 5.0, before: str = "") -> subprocess.Popen[str]:
    """A command that has said that it is ready."""
    program = before + COMMAND.format(body=body)
    line = [sys.executable, "-c", program, str(echo)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str], *numbers: int, gap: float = 0.1) -> tuple[int, str, str]:
    """Send signals; exit code, standard output and standard error."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(gap)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("body", [WAITS, IN_EXEC])
def test_each_signal_has_the_same_code_and_sentence(body: str, number: int) -> None:
    library = "import atexit, logging; logging.basicConfig(level=0)\n"
    library += "atexit.register(logging.info, 'statistics')"
    assert ended(started(body, before=library), number) == (130, "", "interrupted\n")


def test_a_signal_waits_for_what_cannot_be_interrupted() -> None:
    assert ended(started(HOLDS), signal.SIGTERM) == (130, "whole\n", "interrupted\n")


@pytest.mark.parametrize("second", SIGNALS)
def test_further_signals_are_the_first_ones_echo(second: int) -> None:
    code = ended(started(CLOSES), signal.SIGINT, second, signal.SIGTERM)
    assert code == (130, "closed\n", "interrupted\n")


def test_a_second_wish_ends_what_hangs() -> None:
    process = started(HANGS, echo=0.05)
    code, _, errors = ended(process, signal.SIGINT, signal.SIGINT, gap=0.3)
    assert code == 130 and errors.startswith("interrupted again: ended at once")


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = started(WAITS, before=before)
    assert ended(process, signal.SIGHUP, signal.SIGTERM, gap=0.5)[0] == 130
    body = "import signal; ready(); time.sleep(2)"
    assert ended(started(body, before=before), signal.SIGHUP)[0] == 0


def test_in_a_longer_process_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), terminable():
        with held():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop_requested()
        pytest.fail("the block's end acts on the signal")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not stop_requested()


def test_a_signal_while_modules_are_imported(tmp_path: Path) -> None:
    slow = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    fails = "except BaseException:\n    raise ImportError('broken') from None\n"
    (tmp_path / "torch.py").write_text(slow + fails)
    line = [sys.executable, "-m", "d3etr", "evaluate", str(tmp_path), "--annotations", "none.json"]
    search = os.pathsep.join([str(tmp_path), package_environment().get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*line, "--images", "none"],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert ended(process, signal.SIGTERM) == (130, "", "interrupted\n")


@contextmanager
def training(make_config: MakeConfig, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run under a Ray of its own; whatever is left of it is ended."""
    config = make_config("optimisation.epochs=5000", "run.checkpoint_every_epochs=1000")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    settings = os.environ | package_environment() | {"RAY_ADDRESS": "", mark(tmp_path): "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "d3etr", "train", str(tmp_path / "recipe.yaml")],
        env=settings | {"http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"},
        stderr=(tmp_path / "errors.txt").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in family(tmp_path):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def mark(tmp_path: Path) -> str:
    """The name of a variable that everything that a test starts has."""
    return f"D3ETR_TEST_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_")


def family(tmp_path: Path) -> list[int]:
    """All processes that a test has started, wherever they belong by now."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark(tmp_path).encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Also those that have written a title over their environment, where ``family`` looks."""
    return list(psutil.Process(pid).children(recursive=True))


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def group_of(pid: int) -> int:
    """The process group of a process, which may be gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def wait_until(true: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "delay", "numbers"),
    [
        ("starting Ray", 0.3, [signal.SIGTERM]),
        ("starting Ray", 2.5, [signal.SIGINT, signal.SIGTERM]),
        ("starting 1 worker", 1.0, [signal.SIGTERM]),
        ("training ", 0.1, [signal.SIGTERM, signal.SIGHUP]),
    ],
)
def test_a_signal_under_ray_ends_all_that_was_started(
    make_config: MakeConfig, tmp_path: Path, said: str, delay: float, numbers: list[int]
) -> None:
    errors = tmp_path / "errors.txt"
    with training(make_config, tmp_path) as process:
        wait_until(lambda: has_line(errors, said))
        time.sleep(delay)
        if said == "training ":
            assert open_to_others(family(tmp_path)) == []
            # Ray's processes would end before the command has written what it has to.
            reached = [pid for pid in family(tmp_path) if group_of(pid) == process.pid]
            assert reached == [process.pid]
        started = descendants(process.pid)
        for number in numbers:  # to all of them, as a terminal or a service manager does
            os.killpg(process.pid, number)
        assert process.wait(60) == 130
        text = errors.read_text()
        wait_until(lambda: not (family(tmp_path) or alive(started)), 10)
    assert text.count("interrupted; ") == 1 and "--resume" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "runs").glob("*/lock"))


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_worker(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two agents of Ray's, which hold nothing, end by themselves within a minute or so."""
    with training(make_config, tmp_path) as process:
        wait_until(lambda: has_line(tmp_path / "errors.txt", "training "))
        started = [one for one in descendants(process.pid) if "Agent" not in one.cmdline()[0]]
        assert len(started) > 5 and any("RayTrainWorker" in one.cmdline()[0] for one in started)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(started), 10)


def has_line(file: Path, start: str) -> bool:
    """Whether a line begins with ``start``, behind the time of day."""
    return re.search(rf"^\d\d:\d\d:\d\d {start}", file.read_text(), re.MULTILINE) is not None


def open_to_others(processes: list[int]) -> list[str]:
    """Where processes listen for other machines."""
    places = [
        f"{psutil.Process(pid).name()} {connection.laddr.ip}:{connection.laddr.port}"
        for pid in processes
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == "LISTEN"
    ]
    assert places
    return [place for place in places if " 127." not in place and " ::ffff:127." not in place]
