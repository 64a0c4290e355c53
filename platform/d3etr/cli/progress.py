"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from d3etr.data.progress import Progress
from d3etr.text import printable, styled

QUIET_SECONDS = 2.0
"""Work that is done sooner is not worth a line."""
LINE_SECONDS = 10.0


def print_progress(text: str, done: int = 0, total: int = 0) -> None:
    """Write a line to standard error."""
    print(_counted(text, done, total), file=sys.stderr, flush=True)


def _counted(text: str, done: int, total: int) -> str:
    return f"{text}: {done:,} of {total:,}" if total else text


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives what library functions take as ``progress``; writes to standard error."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    with Bar(console=Console(file=styled(sys.stderr)), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


class _Lines:
    """A line after a while, and then every so often."""

    def __init__(self) -> None:
        self._next = time.monotonic() + QUIET_SECONDS

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_SECONDS
            print_progress(what, done, total)
