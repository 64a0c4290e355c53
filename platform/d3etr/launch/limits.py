"""Limits of the system (memory, files, processes) as one sentence with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from d3etr.errors import UserError

LIMITS = {
    r"shared memory|Bus error": "the system has no shared memory left (df -h /dev/shm): containers "
    "need more, for example docker run --shm-size=2g; --set data.workers=0 needs none",
    r"CUDA out of memory|CUDNN_STATUS_ALLOC_FAILED|[Cc]an(?:not|'t) allocate memory|^MemoryError|"
    r"killed by signal: Killed|running low on memory": "there is not enough memory, of the GPU or "
    "of the machine: a larger optimisation.accumulation makes each worker hold fewer images at "
    "once and changes no loss but for dropout; fewer data.workers or cluster.workers help too",
    r"Too many open files|can't start new thread|Resource temporarily unavailable|pthread_create|"
    r"No space left on device|AF_UNIX path": "the system is at a limit of its own (open files: "
    "ulimit -n; processes: ulimit -u; space, or a long path, for temporary files: TMPDIR). Allow "
    "more, or ask for fewer data.workers and cluster.workers",
}
"""What the system's words contain -> what to do."""


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
        for pattern, text in LIMITS.items():
            for line in (lines[0], lines[-1]):
                if re.search(pattern, line):
                    return UserError(
                        f"{text}. The same command goes on with the run.\nThe system says: {line}"
                    )
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
