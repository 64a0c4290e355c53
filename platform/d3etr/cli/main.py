"""Every command by name, and what its end means to the shell."""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import TextIOWrapper
from typing import Any

import d3etr
from d3etr.cli import (
    attention,
    benchmark,
    check_data,
    compare,
    completion,
    demo,
    evaluate,
    explain,
    export,
    import_weights,
    init,
    predict,
    pretrain_backbone,
    pseudo_label,
    register,
    render_digit_scenes,
    serve,
    store_views,
    sweep,
    train,
    verdict,
    weights,
)
from d3etr.cli.command import USER_MISTAKE, Command
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.limits import explained
from d3etr.launch.process import report_interrupt, stop_requested
from d3etr.logs import make_plain
from d3etr.text import safe

COMMANDS: tuple[Command, ...] = (
    demo.COMMAND,
    init.COMMAND,
    check_data.COMMAND,
    pretrain_backbone.COMMAND,
    store_views.COMMAND,
    train.COMMAND,
    sweep.COMMAND,
    evaluate.COMMAND,
    export.COMMAND,
    import_weights.COMMAND,
    weights.COMMAND,
    predict.COMMAND,
    serve.COMMAND,
    pseudo_label.COMMAND,
    compare.COMMAND,
    register.COMMAND,
    benchmark.COMMAND,
    verdict.COMMAND,
    attention.COMMAND,
    explain.COMMAND,
    completion.COMMAND,
    render_digit_scenes.COMMAND,
)
FAILED = 1
_OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
"""The system's errors that a path alone can cause, wherever it is looked at first."""


def whole(arguments: Sequence[str] | None = None) -> int:
    """``main``; the traceback of a fault of ours loses credentials too."""
    warnings.formatwarning = _as_sentence
    try:
        return main(arguments)
    except Exception:
        traceback.print_exc(file=safe(sys.stderr))
        return FAILED


def _as_sentence(message: Warning | str, *details: Any, **more: Any) -> str:
    """A library's warning without the library's path, which helps no user."""
    return f"warning: {message}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        The exit code: 0, 1 for a run that broke, 2 for a mistake that the user can fix (each
        reported in one text on standard error), 130 after Ctrl-C, or the command's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # file names need not be text of its encoding
            stream.reconfigure(errors="backslashreplace")
    # What threads, warnings and libraries write is nobody's to check: nothing gets past these.
    with redirect_stdout(safe(sys.stdout)), redirect_stderr(safe(sys.stderr)):
        options = build_parser().parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.addFilter(make_plain)
        return _run(options)


def _run(options: Namespace) -> int:
    command: Command = options.command
    try:
        return command.run(options)
    except KeyboardInterrupt as stop:
        return report_interrupt(stop)
    except Exception as error:
        # Some libraries turn an interruption into an error of their own.
        return report_interrupt() if stop_requested() else _failed(error)


def _failed(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError) and _reader_has_left():
        # The reader, such as head, has seen enough; nothing may be flushed into its pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in _OF_A_NAME and error.filename is not None:
        error = UserError(f"{error.filename}: {error.strerror}: expected a path of this machine")
    if not isinstance(error, UserError | RunFailedError):
        limit = explained(error)
        if limit is None:
            raise error
        error = limit
    print(f"error: {error}", file=sys.stderr)
    return USER_MISTAKE if isinstance(error, UserError) else FAILED


def _reader_has_left() -> bool:
    """Whether standard output is a pipe that nobody reads: other pipes break for other reasons."""
    try:
        watch = select.poll()
        watch.register(sys.stdout, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="d3etr",
        description="Knowledge distillation for detection transformers.",
        epilog="d3etr COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"d3etr {d3etr.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        below = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.add_arguments(below)
        below.set_defaults(command=command)
    return parser
