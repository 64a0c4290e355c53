"""Requests that end a run in MLflow: each is made whatever became of the others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar

from mlflow.tracking import MlflowClient

from d3etr.logs import get_logger
from d3etr.tracking.server import UPLOAD_TIMEOUT_SECONDS, first_line, patience

logger = get_logger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Answer = TypeVar("Answer")
MISSING = "missing"
"""Tag of a run whose status is final and whose results are not all there."""
CONFLICTS = ("unique constraint", "duplicate", "database is locked", "deadlock")
"""What databases say where two processes write the same at the same moment."""
PAUSES_SECONDS = (0.1, 0.5, 2.0)


def attempt_all(
    steps: Mapping[str, Callable[[], None]], begin: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Take every step; after one that waited in vain for an answer, none of the others.

    Args:
        steps: by the name of what they send.
        begin: called with the name before each.

    Returns:
        The steps that were not taken, with the reason.
    """
    failures: dict[str, str] = {}
    hopeless = False
    for name, step in steps.items():
        if hopeless:
            failures[name] = "not tried: nothing answers"
            continue
        begin(name)
        begun = time.monotonic()
        try:
            with patience(UPLOAD_TIMEOUT_SECONDS, retries=1):
                settled(step)
        except Exception as error:  # whatever MLflow, its artifact stores or the network raise
            logger.debug("MLflow did not take %s", name, exc_info=True)
            failures[name] = first_line(error)
            hopeless = time.monotonic() - begun > UPLOAD_TIMEOUT_SECONDS
    return failures


def settled(action: Callable[[], Answer]) -> Answer:
    """What ``action`` returns; repeated where another process wrote the same just then."""
    for pause in PAUSES_SECONDS:
        try:
            return action()
        except Exception as error:
            if not any(text in str(error).lower() for text in CONFLICTS):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return action()


def close_run(
    client: MlflowClient,
    run_id: str,
    status: Status,
    results: Callable[[], Mapping[str, Callable[[], None]]],
    *,
    ended: int | None = None,
    missing: Mapping[str, str] | None = None,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, str]:
    """End a run, then send its results: the status never waits for them.

    Until all are there, tag ``missing`` names those that are not.

    Args:
        client: of MLflow.
        run_id: the run.
        status: how it ended.
        results: steps that send the results, see ``attempt_all``; asked for once it has ended.
        ended: when, in milliseconds since 1970; None is now.
        missing: what is known to be missing, with the reason.
        begin: called with a result's name before it is sent.

    Returns:
        What MLflow does not have, with the reason.
    """
    failures = dict(missing or {})
    warn = partial(client.set_tag, run_id, MISSING, "results (not sent yet)")
    close = partial(client.set_terminated, run_id, status, end_time=ended)
    closing = attempt_all({"tags": warn, "status": close})
    if "status" in closing:
        return failures | closing | {"results": "not tried"}
    failures |= attempt_all(results(), begin)
    if failures:
        name = partial(client.set_tag, run_id, MISSING, listed(failures))
    else:
        name = partial(client.delete_tag, run_id, MISSING)
    return failures | attempt_all({"tags": name})


def listed(failures: Mapping[str, str]) -> str:
    """``weights, model (no space left)``: what is missing, and why the first of it is."""
    return f"{', '.join(failures)} ({next(iter(failures.values()))})"
