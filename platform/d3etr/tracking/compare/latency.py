"""Latencies of networks, as ``d3etr benchmark --json`` measured them side by side.

What a run measures while it evaluates is of that moment: runs of one network differ by what else
the machine did. So a comparison shows latencies of one benchmark, one value for each network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from d3etr.detectors.weights import read_info
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.files import read_json
from d3etr.tracking.compare.runs import FinishedRun

RUN_AS = "eager float32"


@dataclass(frozen=True)
class Latencies:
    """Of one benchmark.

    Attributes:
        machine: processor or GPU, and threads.
        batch: images at once.
        milliseconds: digest of a network (``WeightsInfo.network``) -> p50 of a batch in PyTorch,
            eager float32; where several files have it, the median of theirs.
    """

    machine: str
    batch: int
    milliseconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """How it was measured."""
        return {"machine": self.machine, "batch": self.batch, "run_as": RUN_AS}

    def of(self, run: FinishedRun) -> float | None:
        """Of a run's network; None where it was not measured, or the run has no weights."""
        weights = RunFolder(run.folder).weights
        if not weights.is_file():
            return None
        return self.milliseconds.get(read_info(weights).network)


def read_latencies(path: Path, runs: Sequence[FinishedRun]) -> Latencies:
    """Read what ``d3etr benchmark --json`` printed; of several batch sizes the smallest counts.

    Args:
        path: the file.
        runs: that it is read for.

    Raises:
        UserError: the file is missing or something else, or has none of the runs' networks in
            float32.
    """
    try:
        found = read_json(path)
        rows = [_row(row) for row in found["rows"] if row["run_as"] == RUN_AS and row["network"]]
        device, machine = str(found["device"]), str(found["machine"])
    except FileNotFoundError:
        raise UserError(f"--latency: {path} does not exist: {_ADVICE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--latency: {path} is not what d3etr benchmark --json prints ({error}): {_ADVICE}"
        ) from error
    if not rows:
        raise UserError(f"--latency: {path} has no weights file in {RUN_AS}: {_ADVICE}")
    batch = min(row[1] for row in rows)
    by_network = dict[str, list[float]]()
    for network, size, milliseconds in rows:
        if size == batch:
            by_network.setdefault(network, []).append(milliseconds)
    shown = f"{machine}, {device}" if device.startswith("CPU") else device
    latencies = Latencies(shown, batch, {name: median(ms) for name, ms in by_network.items()})
    if all(latencies.of(run) is None for run in runs):
        raise UserError(f"--latency: {path} has none of these runs' networks: {_ADVICE}")
    return latencies


_ADVICE = "write one with d3etr benchmark runs/*/weights.safetensors --json > latency.json"


def _row(row: Mapping[str, Any]) -> tuple[str, int, float]:
    return str(row["network"]), int(row["batch"]), float(row["p50_ms"])
