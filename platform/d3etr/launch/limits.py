"""Limits of the system (memory, files, processes, paths) as one sentence with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from d3etr.errors import UserError

AGAIN = "The same command goes on with the run."
LIMITS = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"shared memory|Bus error",
            "the system has no shared memory left (df -h /dev/shm): containers need more, for "
            "example docker run --shm-size=2g; --set data.workers=0 needs none",
        ),
        (
            r"Too many open files",
            "this process may open no more files (ulimit -n): allow more, for example ulimit -n "
            "65536, or ask for fewer data.workers",
        ),
        (
            r"can't start new thread|Resource temporarily unavailable|pthread_create",
            "the system allows no more processes or threads (ulimit -u, or a container's limit of "
            "processes): allow more, or ask for fewer data.workers and cluster.workers",
        ),
        (
            r"AF_UNIX path",
            "the path of the folder for temporary files is too long for sockets: set TMPDIR (for "
            "Ray RAY_TMPDIR) to a shorter one, such as /tmp",
        ),
        (
            r"CUDA out of memory|CUDNN_STATUS_ALLOC_FAILED",
            "the GPU's memory does not hold this: a larger optimisation.accumulation makes each "
            "worker hold fewer images at once and changes no loss but for dropout",
        ),
        (
            r"[Cc]an(?:not|'t) allocate memory|^MemoryError|killed by signal: Killed",
            "this machine's memory does not hold this: a larger optimisation.accumulation makes "
            "each worker hold fewer images at once, and fewer data.workers need less",
        ),
        (
            r"No space left on device",
            "no space left on a disk, perhaps that of the folder for temporary files (TMPDIR): "
            "free some",
        ),
    )
)


def explained(error: BaseException) -> UserError | None:
    """The sentence for a limit of the system that an exception names; None for any other.

    Args:
        error: also one that holds another process's traceback as text.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in seen:
        lines = f"{type(one).__name__}: {one}".strip().splitlines()
        # The first line of an exception, and the last of a traceback that is its text.
        for pattern, text in LIMITS:
            for line in (lines[0], lines[-1]):
                if isinstance(one, OSError | RuntimeError | MemoryError) and pattern.search(line):
                    return UserError(f"{text}. {AGAIN}\nThe system says: {line}")
    return None


@contextmanager
def clear_limits() -> Iterator[None]:
    """Turn exceptions that speak of a limit of the system into a sentence.

    Raises:
        UserError: naming the limit.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        answer = explained(error)
        if answer is None:
            raise
        raise answer from error
