"""Latencies as a table, as plain values, and as a picture of mAP over milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3etr.latency.contenders import Contender, TorchContender, Way
from d3etr.latency.measure import Timing
from d3etr.tracking.compare.tables import Table
from d3etr.tracking.figures.style import legend, new_figure, plain_axes, save, series_styles

HEADINGS = (
    "detector",
    "run as",
    "batch",
    "p50 ms",
    "p95 ms",
    "images/s",
    "mAP %",
    "M parameters",
    "G operations",
    "pixels",
    "file MB",
)


@dataclass(frozen=True)
class Row:
    """One detector as it ran one way."""

    detector: Contender
    way: Way
    timing: Timing

    @property
    def quality(self) -> float | None:
        """mAP, a fraction, as its weights file has it."""
        value = self.detector.evaluation.get("mAP")
        return None if value is None else float(value)

    @property
    def peak_bytes(self) -> int | None:
        """On a GPU at the peak, beside the weights; None where PyTorch does not count it."""
        return self.timing.memory if isinstance(self.detector, TorchContender) else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; milliseconds are of a batch."""
        return {
            "detector": self.detector.name,
            "run_as": self.detector.run_as(self.way),
            "batch": self.way.batch,
            "p50_ms": self.timing.median,
            "p95_ms": self.timing.p95,
            "images_per_second": self.timing.images_per_second,
            "peak_bytes": self.peak_bytes,
            "file_bytes": self.detector.file_bytes,
            "network": self.detector.network,
            "mAP": self.quality,
            "data_digest": self.detector.evaluation.get("data_digest"),
            "parameters": self.detector.parameters,
            "operations": self.detector.operations,
            "height": self.detector.size[0],
            "width": self.detector.size[1],
        }


def table(rows: Sequence[Row], device: str) -> Table:
    """One line for each, memory only where it was measured."""
    memory = any(row.peak_bytes is not None for row in rows)
    headings = HEADINGS + (("peak MiB",) if memory else ())
    return Table(f"Latency, {device}", headings, tuple(_cells(row, memory) for row in rows))


def _cells(row: Row, memory: bool) -> tuple[str, ...]:
    height, width = row.detector.size
    cells = (
        row.detector.name,
        row.detector.run_as(row.way),
        f"{row.way.batch}",
        f"{row.timing.median:,.1f}",
        f"{row.timing.p95:,.1f}",
        f"{row.timing.images_per_second:,.1f}",
        "-" if row.quality is None else f"{100 * row.quality:.1f}",
        _scaled(row.detector.parameters, 1e6),
        _scaled(row.detector.operations, 1e9),
        f"{width} x {height}",
        _scaled(row.detector.file_bytes, 1e6),
    )
    return cells + ((_scaled(row.peak_bytes, 2**20, 0),) if memory else ())


def _scaled(value: int | None, unit: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know."""
    found = [
        "Milliseconds are of a batch, from resized pixels in memory to detections there: "
        "normalising and, with a GPU, the way there and back are in them, decoding and resizing "
        "pictures is not. All took turns in one process, so memory of the CPU is no one's own; "
        "the size of the file is."
    ]
    lacking = {row.detector.name for row in rows if row.quality is None}
    if lacking:
        found.append(
            f"{', '.join(sorted(lacking))}: the file says no mAP; measure it with 'd3etr "
            "evaluate', or give --annotations to 'd3etr export --quantise'."
        )
    digests: Mapping[str, object] = {
        row.detector.name: row.detector.evaluation.get("data_digest")
        for row in rows
        if row.quality is not None
    }
    if len({*digests.values()}) > 1:
        found.append("mAP is of different data sets: do not compare it.")
    return found


def draw(rows: Sequence[Row], path: Path, device: str) -> Path:
    """Write mAP over milliseconds, a bar from p50 to p95; rows without mAP are left out."""
    figure = new_figure(6.5, 4.2, f"mAP over latency, {device}")
    axes = figure.subplots()
    plain_axes(axes, "milliseconds of a batch, p50 to p95", "mAP, %")
    shown = [row for row in rows if row.quality is not None]
    for row, (colour, _) in zip(shown, series_styles(len(shown)), strict=True):
        height = 100 * (row.quality or 0.0)
        label = f"{row.detector.name}, {row.detector.run_as(row.way)}, {row.way.batch} at once"
        axes.plot(row.timing.median, height, "o", color=colour, label=label)
        axes.hlines(height, row.timing.median, row.timing.p95, color=colour)
    axes.set_xlim(left=0)
    if shown:
        legend(axes, loc="lower right")
    return save(figure, path)
