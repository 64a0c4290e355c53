"""The command line: ``d3etr COMMAND``. Each command is a file; nothing here is slow to import."""

import os
from collections.abc import Sequence
from typing import NoReturn

from d3etr.launch.process import run_command


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command as all that this process does, and end it with the exit code."""
    # OpenMP's threads spin while they wait for each other: beside other programs each holds the
    # core that the other one needs. This is long enough for a machine of one's own, and 15 times
    # shorter than the default. Read when PyTorch is imported, and by Ray's workers in turn.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from d3etr.cli.main import whole  # signals are noted while it is imported

    return whole(arguments)
