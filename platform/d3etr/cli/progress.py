"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from d3etr.progress import OnProgress, PacedProgress, counted, stamped
from d3etr.text import printable, styled

QUIET_SECONDS = 2.0
"""Work that is done sooner is not worth a line."""
LINE_SECONDS = 10.0


def print_progress(text: str, done: int = 0, total: int = 0, /) -> None:
    """Write a line to standard error."""
    print(counted(text, done, total), file=sys.stderr, flush=True)


def log_progress(text: str, done: int = 0, total: int = 0, /) -> None:
    """Write a line with the time of day to standard error, for work of hours."""
    print(stamped(counted(text, done, total)), file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """Gives what library functions take as ``on_progress``; writes to standard error."""
    if not sys.stderr.isatty():
        yield PacedProgress(print_progress, QUIET_SECONDS, LINE_SECONDS)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    with Bar(console=Console(file=styled(sys.stderr)), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(text: str, done: int = 0, total: int = 0, /) -> None:
            if text not in tasks:
                tasks[text] = bar.add_task(escape(printable(text)), total=total)
            bar.update(tasks[text], completed=done, total=total)

        yield show
