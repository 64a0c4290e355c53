"""What every test may rely on."""

import os
from pathlib import Path

import pytest

# One thread: tests must not slow each other down, and sums must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is reported to anyone.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds platform/, trainers/ and tests/."""
    return Path(__file__).resolve().parent.parent
