"""Limits of the system end as one sentence with the remedy."""

import errno
import os

import pytest

from d3etr.errors import UserError
from d3etr.launch.limits import clear_limits, explained

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback ...\n{0}: {1}\n"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (RuntimeError(WORKER.format("OSError", "[Errno 24] Too many open files")), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
        (OSError("AF_UNIX path too long"), "TMPDIR"),
        (ValueError("x"), None),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "accumulation"),
        (MemoryError(), "accumulation"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "optimisation.accumulation"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "space"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_each_limit_has_its_remedy(error: Exception, remedy: str | None) -> None:
    answer = explained(error)
    if remedy is None:
        assert answer is None
        with pytest.raises(type(error)), clear_limits():
            raise error
        return
    assert remedy in str(answer) and "Traceback" not in str(answer)
    with pytest.raises(UserError), clear_limits():
        raise error


def test_a_limit_is_found_behind_what_it_caused() -> None:
    with pytest.raises(UserError, match="ulimit -n"), clear_limits():
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError as error:
            raise RuntimeError("the batch could not be made") from error
