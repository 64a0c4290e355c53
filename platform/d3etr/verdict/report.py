"""A verdict as table, Markdown, JSON, picture and MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from d3etr.config.tree import Config
from d3etr.engine.journal import read_journal
from d3etr.engine.run_folder import RunFolder
from d3etr.evaluation.judge import SIZES, Difference, Standing
from d3etr.evaluation.resampling import Interval, over_seeds
from d3etr.files import write_text
from d3etr.tracking.compare.tables import MISSING, Table
from d3etr.tracking.figures.bands import Band, draw_bands
from d3etr.tracking.figures.style import save
from d3etr.verdict.contenders import DISTILLED
from d3etr.verdict.found import Found, Ran, Stage

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "verdict.json", "verdict.md", "verdict.png"
REACHED = ("contender", "mAP", "95 %", "gain", "95 %", "answer")
CHANGES = (f"over '{DISTILLED}'", "95 %")
"""Headings where there are other distilled contenders."""
MORE = ("AP S / M / L", "steps", "cost", "seconds")
MANY_CLASSES = 20


def results_table(found: Found) -> Table:
    """A row for each contender; accuracy in percent, gains in points."""
    stage = found.stage
    plain = min(found.costs.seconds.values())
    changed = any(each.change is not None for each in stage.judgement.standings)
    rows = []
    for ran in stage.ran:
        standing = stage.judgement.of(ran.entry.way.name)
        gain = standing.gain
        sizes = " / ".join(_percent(standing.sizes[name]) for name in SIZES)
        rows.append(
            (
                standing.name,
                _percent(standing.mAP.both.mean),
                _ends(standing.mAP.both),
                *_points(gain),
                "the rival" if gain is None else gain.answer,
                *(_points(standing.change) if changed else ()),
                sizes,
                f"{ran.entry.steps:,}",
                f"{found.costs.seconds[standing.name] / plain:.2f}",
                f"{ran.seconds:.0f}",
            )
        )
    title = (
        f"{stage.split} split, %; intervals for other seeds and other images; cost of a step "
        "beside the cheapest; seconds of training steps"
    )
    headings = (*REACHED, *(CHANGES if changed else ()), *MORE)
    return Table(title, headings, tuple(rows))


def classes_table(found: Found) -> Table:
    """AP of each class, a column a contender; nothing where there are many."""
    standings = found.stage.judgement.standings
    names = list(standings[0].classes)
    rows = tuple(
        (name, *(_percent(standing.classes[name]) for standing in standings))
        for name in (names if len(names) <= MANY_CLASSES else [])
    )
    return Table("AP of each class, %", ("class", *(each.name for each in standings)), rows)


def notes(found: Found) -> list[str]:
    """What else there is to say, a sentence each."""
    said = list(found.cautions)
    said += [f"'{name}' did not take part: {reason}" for name, reason in found.left_out.items()]
    said += found.failed
    if found.rates:
        rates = ", ".join(f"{name} x {rate:g}" for name, rate in found.rates.items())
        said.append(f"Learning rates, chosen on validation by short runs: {rates}.")
    if found.early is not None and found.final is not None:
        said.append(f"Early, by runs of a quarter of the steps: {found.early.sentence}")
        said += [f"'{name}' was stopped early." for name in found.early.stopped]
    return said


def as_markdown(found: Found) -> str:
    """The whole verdict."""
    tables = [table for table in (results_table(found), classes_table(found)) if table.rows]
    parts = [f"# {found.sentence}", f"`{found.command}`", *map(_markdown, tables)]
    parts += ["\n".join(f"- {note}" for note in notes(found))] if notes(found) else []
    return "\n\n".join([*parts, f"![mAP over time]({PICTURE_FILE})"]) + "\n"


def as_json(found: Found) -> dict[str, Any]:
    """Plain values; accuracy as fractions."""
    return {
        "sentence": found.sentence,
        "answer": found.stage.answer,
        "command": found.command,
        "minutes": found.minutes,
        "settled_early": found.final is None,
        "left_out": dict(found.left_out),
        "rates": dict(found.rates),
        "notes": notes(found),
        **_stage_json(found, found.stage),
        "early": None if found.early is None else _stage_json(found, found.early),
    }


def write_files(found: Found) -> list[Path]:
    """Write JSON, Markdown and picture into the verdict's folder; returns them."""
    files = [found.folder / name for name in (JSON_FILE, MARKDOWN_FILE, PICTURE_FILE)]
    write_text(files[0], json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    write_text(files[1], as_markdown(found))
    stage = found.stage
    bands = [band for ran in stage.ran if (band := band_of(ran)) is not None]
    save(draw_bands(bands, "Mean and 95 % interval over seeds", stage.ran[0].clock), files[2])
    return files


def band_of(ran: Ran) -> Band | None:
    """Validation mAP over time, where all seeds were measured.

    What the teacher did before the first step counts.
    """
    curves = [_curve(folder) for folder in ran.folders]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return None
    spreads = [over_seeds(np.array([curve[step] for curve in curves])) for step in steps]
    before, pace = ran.entry.prepared, ran.seconds / ran.entry.steps
    hours = [(before + step * pace) / 3600 for step in steps]
    ends = ([s.mean for s in spreads], [s.low for s in spreads], [s.high for s in spreads])
    return Band(ran.entry.way.name, hours, *ends)


def track(found: Found, config: Config, files: list[Path]) -> list[str]:
    """Send it to MLflow; see ``track_verdict``."""
    from d3etr.tracking.verdict import track_verdict  # slow to import

    metrics = dict[str, float]()
    for standing in found.stage.judgement.standings:
        name = standing.name.replace(" ", "_")
        metrics[f"{name}/mAP"] = standing.mAP.both.mean
        if standing.gain is not None:
            both = asdict(standing.gain.both)
            metrics |= {f"{name}/gain_{key}": value for key, value in both.items()}
    stage = found.stage
    params = {"minutes": f"{found.minutes:g}", "split": stage.split, "answer": stage.answer}
    params |= {"rival": stage.judgement.rival, "command": found.command}
    return track_verdict(config, found.folder, found.sentence, params, metrics, files)


def _stage_json(found: Found, stage: Stage) -> dict[str, Any]:
    judgement = stage.judgement
    lead = judgement.lead
    return {
        "split": stage.split,
        "rival": judgement.rival,
        "teacher": judgement.teacher,
        "lead": None if lead is None else _difference_json(lead),
        "stopped": list(stage.stopped),
        "contenders": [
            _standing_json(judgement.of(ran.entry.way.name))
            | {
                "steps": ran.entry.steps,
                "rate": ran.entry.rate,
                "step_seconds": found.costs.seconds[ran.entry.way.name],
                "seconds": ran.seconds,
                "clock": ran.clock,
                "runs": [str(folder) for folder in ran.folders],
            }
            for ran in stage.ran
        ],
    }


def _standing_json(standing: Standing) -> dict[str, Any]:
    gain, change = standing.gain, standing.change
    return {
        "name": standing.name,
        "distilled": standing.distilled,
        "validation": standing.validation,
        "maps": list(standing.maps),
        "mAP": _difference_json(standing.mAP),
        "gain": None if gain is None else _difference_json(gain),
        "change": None if change is None else _difference_json(change),
        "sizes": dict(standing.sizes),
        "classes": dict(standing.classes),
    }


def _difference_json(difference: Difference) -> Mapping[str, Any]:
    return asdict(difference) | {"answer": difference.answer}


def _curve(folder: Path) -> dict[int, float]:
    """Optimiser step -> validation mAP."""
    return {
        record["step"]: record["metrics"]["val/mAP"]
        for record in read_journal(RunFolder(folder).journal)
        if record["kind"] == "evaluation" and "val/mAP" in record["metrics"]
    }


def _markdown(table: Table) -> str:
    rows = [table.headings, ("---",) + ("---:",) * (len(table.headings) - 1), *table.rows]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([f"{table.title}:", "", *lines])


def _points(difference: Difference | None) -> tuple[str, str]:
    """The mean and its interval."""
    if difference is None:
        return MISSING, MISSING
    return f"{100 * difference.both.mean:+.1f}", _ends(difference.both, "+")


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _ends(interval: Interval, sign: str = "") -> str:
    return f"{100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f}"
