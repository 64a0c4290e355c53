"""The command line: ``d3etr COMMAND``. Each command is a file; nothing here is slow to import."""

import os
from collections.abc import Sequence
from typing import NoReturn

from d3etr.launch.process import WAITING, run_command


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command as all that this process does, and end it with the exit code."""
    os.environ.setdefault(*WAITING)
    run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from d3etr.cli.main import whole  # signals are noted while it is imported

    return whole(arguments)
