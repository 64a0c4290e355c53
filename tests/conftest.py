"""What every test may rely on."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

# One thread: tests must not slow each other down, and sums must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is reported to anyone.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A shell starts what it puts into the background without Ctrl-C, and nohup without SIGHUP, for all
# that this starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import torch

# Where kernels cannot run they are interpreted, if this is said before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: a worker that gets one last keeps the others waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file nothing moves


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds platform/, trainers/ and tests/."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of a tiny detector of trees (3), cats (7) and dogs (90), random weights."""
    from tiny import tiny_detector_config

    from d3etr.config.data import PreprocessingConfig
    from d3etr.detectors.build import build_detector
    from d3etr.detectors.weights import WeightsInfo, save_weights

    torch.manual_seed(0)
    config = tiny_detector_config()
    info = WeightsInfo(
        detector=config,
        categories=((3, "tree"), (7, "cat"), (90, "dog")),
        preprocessing=PreprocessingConfig(normalisation="per_image", shortest_side=None),
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, build_detector(config, 3), info)
    return path
