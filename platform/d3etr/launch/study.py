"""Studies: rows of recipes times seeds, each trained in a process of its own, as one table."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from d3etr.config.base import Section
from d3etr.config.data import FilePath
from d3etr.config.load import load_config
from d3etr.errors import UserError
from d3etr.launch.folder import folder_of
from d3etr.training.storage import write_text


class StudyRow(Section):
    """One configuration of a study."""

    recipe: FilePath
    set: tuple[str, ...] = ()
    """Overrides, as after ``--set``."""


class Study(Section):
    """Which configurations are compared, over which seeds."""

    title: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    metric: str = "test/mAP"
    set: tuple[str, ...] = ()
    """Overrides of every row."""
    baseline: str
    """The row that gains are counted from."""
    rows: dict[str, StudyRow]


@dataclass(frozen=True)
class Cell:
    """One run of a study: a row and a seed."""

    row: str
    seed: int
    recipe: Path
    overrides: tuple[str, ...]

    def command(self) -> list[str]:
        """What trains it; the interpreter is to be put before."""
        settings = _set_arguments(self.overrides)
        return ["-m", "d3etr", "train", str(self.recipe), *settings, "--launcher", "local"]

    def folder(self) -> Path:
        """The run's folder, which follows from its configuration."""
        return folder_of(load_config(self.recipe, self.overrides)).path


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        path: YAML.
        overrides: ``a.b=c`` texts for every run, below those of its row.

    Raises:
        UserError: it cannot be read, or is no study.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        study = Study.model_validate_json(json.dumps(tree))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path} is no study: {error}") from error
    if study.baseline not in study.rows:
        raise UserError(f"{path}: baseline '{study.baseline}' is none of {', '.join(study.rows)}")
    return study.model_copy(update={"set": (*study.set, *overrides)})


def cells_of(study: Study) -> list[Cell]:
    """Every run, seeds first, so that an interrupted study has whole seeds.

    Raises:
        UserError: a row's configuration is not valid.
    """
    cells = [
        Cell(name, seed, row.recipe, (*study.set, *row.set, f"run.seed={seed}"))
        for seed in study.seeds
        for name, row in study.rows.items()
    ]
    for cell in cells:
        cell.folder()
    return cells


def _set_arguments(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def run_cell(cell: Cell, threads: int) -> dict[str, Any] | str:
    """Train one run, or read what it gave before.

    Returns:
        The run's summary, or the last lines of what it said when it failed.
    """
    summary = cell.folder() / "summary.json"
    if not summary.exists():
        done = subprocess.run(
            [sys.executable, *cell.command()],
            env=_environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not summary.exists():
            return (done.stderr or done.stdout).strip()[-800:] or f"exit code {done.returncode}"
    content: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return content


def run_cells(
    cells: Sequence[Cell], parallel: int, threads: int
) -> Iterator[tuple[Cell, dict[str, Any] | str]]:
    """Train runs, ``parallel`` at a time; yields each as soon as its turn is done."""
    with ThreadPoolExecutor(parallel) as pool:
        yield from zip(cells, pool.map(lambda cell: run_cell(cell, threads), cells), strict=True)


@dataclass(frozen=True)
class RowResult:
    """The runs of one row.

    Attributes:
        name: of the row.
        values: the metric by seed, as a fraction.
        steps: optimiser steps.
        seconds: median training seconds.
        failures: by seed.
    """

    name: str
    values: dict[int, float]
    steps: int
    seconds: float
    failures: dict[int, str]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds, 0 for one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0


def collect(study: Study, results: Sequence[tuple[Cell, dict[str, Any] | str]]) -> list[RowResult]:
    """Group runs by row, in the study's order; rows without any run are left out."""
    rows = []
    for name in study.rows:
        own = [(cell.seed, result) for cell, result in results if cell.row == name]
        good = {seed: result for seed, result in own if isinstance(result, dict)}
        bad = {seed: result for seed, result in own if isinstance(result, str)}
        if own:
            rows.append(
                RowResult(
                    name=name,
                    values={seed: float(result[study.metric]) for seed, result in good.items()},
                    steps=max((int(result["steps"]) for result in good.values()), default=0),
                    seconds=_median([result["training_seconds"] for result in good.values()]),
                    failures=bad,
                )
            )
    return rows


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def table(study: Study, rows: Sequence[RowResult]) -> str:
    """The study as a Markdown table, in percent."""
    base = next((row for row in rows if row.name == study.baseline and row.values), None)
    lines = [
        f"| configuration | steps | {study.metric} by seed | mean | spread | gain |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        shown = " / ".join(
            f"{100 * row.values[seed]:.1f}" if seed in row.values else "failed"
            for seed in sorted({*row.values, *row.failures})
        )
        if not row.values:
            lines.append(f"| {row.name} | | {shown} | | | |")
            continue
        gain = "" if base is None or row is base else f"{100 * (row.mean - base.mean):+.1f}"
        numbers = f"{100 * row.mean:.1f} | {100 * row.spread:.1f} | {gain}"
        lines.append(f"| {row.name} | {row.steps:,} | {shown} | {numbers} |")
    return "\n".join(lines)


def run_study(
    path: Path,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    parallel: int,
    threads: int,
    tell: Callable[[str], None],
) -> list[RowResult]:
    """Run what is missing of a study and write its table as Markdown and JSON after every run.

    Args:
        path: the study file.
        output: folder for ``NAME.md`` and ``NAME.json``.
        overrides: as for ``read_study``.
        parallel: runs at a time.
        threads: threads of tensor operations for each.
        tell: takes a line whenever a run is done.

    Raises:
        UserError: the study or one of its configurations is not valid.
    """
    study = read_study(path, overrides)
    cells = cells_of(study)
    command = shlex.join(["python", "trainers/study.py", str(path), *_set_arguments(overrides)])
    results: list[tuple[Cell, dict[str, Any] | str]] = []
    for cell, result in run_cells(cells, parallel, threads):
        results.append((cell, result))
        said = f"{result[study.metric]:.4f}" if isinstance(result, dict) else f"failed: {result}"
        tell(f"[{len(results)}/{len(cells)}] {cell.row}, seed {cell.seed}: {said}")
        _write(study, command, output / path.stem, results)
    return collect(study, results)


def _write(
    study: Study,
    command: str,
    stem: Path,
    results: Sequence[tuple[Cell, dict[str, Any] | str]],
) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {study.title}\n\n`{command}`\n\n{table(study, collect(study, results))}\n"
    write_text(stem.with_suffix(".md"), text)
    runs = [
        {"row": cell.row, "seed": cell.seed, "command": shlex.join(["python", *cell.command()])}
        | ({"summary": result} if isinstance(result, dict) else {"failure": result})
        for cell, result in results
    ]
    content = {"title": study.title, "command": command, "runs": runs}
    write_text(stem.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
