"""The processes that decode and transform images."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import BaseContext
from threading import Thread

from d3etr.data.allocator import keep_freed_memory


def safe_context(module: str) -> BaseContext:
    """Processes that inherit no threads or locks: a fork of a process with threads may hang.

    Args:
        module: what they need, imported once in the server instead of in every one of them.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def prepare_process(_worker: int) -> None:
    """Make this loading process keep freed memory, and end when the training process is killed.

    PyTorch's own watch looks at the process that forked it. Here that is the fork server, which
    lives until its children end: without this they would wait for each other for ever.
    """
    keep_freed_memory()  # images of one size come again and again here too
    Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
