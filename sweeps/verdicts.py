"""Several verdicts in one table, and as a curve where they differ in one number.

    python sweeps/verdicts.py sweeps/verdicts/labels.yaml               # into runs/
    python sweeps/verdicts.py sweeps/verdicts/labels.yaml --table docs/results

A file names the questions, each what ``d3etr verdict`` is asked:

    name: labels                    # of the files that are written
    title: "What the table is called"
    along: labelled images          # what `at` counts; without it there is no curve
    options: --minutes 3            # of every question
    verdicts:
      5 % of the labels: {at: 300, ask: digits/unlabelled --set data.labelled_share=0.05}

What was asked before is not trained again. Where a question fails, the others are asked.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from d3etr.cli.command import ensure_writable
from d3etr.config.base import Section
from d3etr.config.problems import ConfigError, problems_of
from d3etr.config.yaml_text import parse_yaml, read_text
from d3etr.errors import UserError
from d3etr.files import write_text
from d3etr.launch.process import INTERRUPTED
from d3etr.tracking.figures.style import legend, new_figure, plain_axes, save, series_styles
from d3etr.verdict.report import CHANGES

Record = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Asked(Section):
    """One verdict."""

    ask: str
    """Arguments of ``d3etr verdict``, the recipe first."""
    at: Annotated[float, Field(gt=0)] | None = None
    """Where it stands on the curve, whose axis is logarithmic."""


class Questions(Section):
    """What a file asks."""

    name: Name
    """Of the table's files."""
    title: str
    """Of the table."""
    about: str = ""
    """A paragraph below the title."""
    along: str | None = None
    """What ``at`` counts; None draws no curve."""
    options: str = ""
    """Arguments of every verdict."""
    verdicts: Annotated[dict[str, Asked], Field(min_length=1)]
    """Row -> question."""


def read_questions(file: Path) -> Questions:
    """The questions of a YAML file.

    Raises:
        ConfigError: it is not one.
    """
    tree = parse_yaml(read_text(file), str(file))
    try:
        found = Questions.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(str(file), problems_of(error, Questions)) from error
    missing = [row for row, asked in found.verdicts.items() if found.along and asked.at is None]
    if missing:
        raise UserError(f"{file}: verdicts.{missing[0]}: expected 'at', its place along the curve")
    for row in found.verdicts:
        try:
            command_of(found, row)
        except ValueError as error:
            place = f"{file}: verdicts.{row}.ask, and options"
            raise UserError(f"{place}: not a command line ({error})") from error
    return found


def command_of(questions: Questions, row: str) -> list[str]:
    """What one verdict is asked with, after ``d3etr``."""
    return ["verdict", *shlex.split(f"{questions.verdicts[row].ask} {questions.options}")]


def ask(command: Sequence[str]) -> Record | None:
    """What ``d3etr verdict`` finds; None where it fails, which it says itself.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    run = [sys.executable, "-m", "d3etr", *command, "--json"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as asked:
        try:
            text, _ = asked.communicate()
        except KeyboardInterrupt:
            asked.wait()  # Ctrl-C reaches it too: it saves and ends its workers
            raise
    if asked.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return json.loads(text) if asked.returncode == 0 else None


HEADINGS = ("", "contender", "learning rate", "steps", "seconds", "mAP by seed", "mean", "95 %")
GAINS = ("gain", "95 %", "")


def rows_of(row: str, found: Record, *, changes: bool = False) -> list[tuple[str, ...]]:
    """A line for each contender of a verdict; ``changes``: with ``CHANGES``, too."""
    lines = []
    for each in found["contenders"]:
        mean, gain = each["mAP"]["both"], each["gain"]
        ours = "**" if each["distilled"] else ""
        lines.append(
            (
                row,
                f"{ours}{each['name']}{ours}",
                f"x {each['rate']:g}",
                f"{each['steps']:,}",
                f"{each['seconds']:.0f}",
                " / ".join(f"{100 * value:.1f}" for value in each["maps"]),
                f"{ours}{100 * mean['mean']:.1f}{ours}",
                _ends(mean, ""),
                *(("", "", "rival") if gain is None else _gain(gain)),
                *(_change(each) if changes else ()),
            )
        )
        row = ""
    lead = f", lead {100 * found['lead']['both']['mean']:+.1f}" if found["lead"] else ""
    taught = "" if found["teacher"] is None else f"{100 * found['teacher']:.1f}{lead}"
    rest = ("",) * (len(lines[0]) - 7)
    return [*lines, ("", "teacher", "", "", "", "", taught, *rest)] if taught else lines


def _change(contender: Record) -> tuple[str, ...]:
    """Over the recipe's own student; earlier records do not know it."""
    change = contender.get("change")
    return _gain(change)[:2] if change else ("", "")


def _gain(gain: Record) -> tuple[str, str, str]:
    return f"{100 * gain['both']['mean']:+.1f}", _ends(gain["both"], "+"), gain["answer"]


def _ends(interval: Record, sign: str) -> str:
    return f"{100 * interval['low']:{sign}.1f} to {100 * interval['high']:{sign}.1f}"


def as_markdown(questions: Questions, found: Mapping[str, Record], command: str) -> str:
    """The table, with the command that makes it and the answers in words."""
    changes = any(c.get("change") for each in found.values() for c in each["contenders"])
    headings = (*HEADINGS, *GAINS, *(CHANGES if changes else ()))
    rows = [r for row in found for r in rows_of(row, found[row], changes=changes)]
    lines = [f"# {questions.title}", "", f"`{command}`", ""]
    lines += [questions.about.strip(), ""] if questions.about else []
    if questions.along:
        lines += [f"![mAP over {questions.along}]({questions.name}.svg)", ""]
    lines += [f"| {' | '.join(headings)} |", f"|{' --- |' * 3}{' ---: |' * (len(headings) - 3)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in r)} |" for r in rows]
    lines += ["", "Gains are over the rival, the best on validation that no teacher teaches."]
    lines += ["Intervals are for other seeds and other images.", ""]
    lines += [f"- {row}: {each['sentence']} `{each['command']}`" for row, each in found.items()]
    failed = [row for row in questions.verdicts if row not in found]
    lines += [f"- {row}: failed." for row in failed]
    return "\n".join(lines) + "\n"


def draw(questions: Questions, found: Mapping[str, Record], file: Path) -> None:
    """Draw mAP of each contender over ``at``, with its interval."""
    points = dict[str, list[tuple[float, Record]]]()
    for row, each in found.items():
        at = questions.verdicts[row].at
        for contender in each["contenders"] if at is not None else ():
            points.setdefault(contender["name"], []).append((at, contender["mAP"]["both"]))
    figure = new_figure(7, 4.4, questions.title)
    axes = figure.add_subplot()
    for (name, own), (colour, stroke) in zip(
        points.items(), series_styles(len(points)), strict=True
    ):
        places, spreads = zip(*sorted(own, key=lambda point: point[0]), strict=True)
        low, mean, high = ([100 * s[key] for s in spreads] for key in ("low", "mean", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(places, mean, color=colour, linestyle=stroke, marker="o", label=name)
    plain_axes(axes, str(questions.along), "test mAP (%)")
    axes.set_xscale("log")
    places = sorted({asked.at for asked in questions.verdicts.values() if asked.at is not None})
    axes.set_xticks(places, labels=[f"{at:g}" for at in places])
    axes.minorticks_off()
    legend(axes)
    save(figure, file)


def main() -> int:
    """The command line; 1 where a question failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", type=Path, default=Path("runs"), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="show what would be asked")
    options = parser.parse_args()
    try:
        questions = read_questions(options.file)
        if not options.dry_run:  # before the hours whose results it is to hold
            ensure_writable(options.table / f"{questions.name}.md")
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    found = dict[str, Record]()
    for row in questions.verdicts:
        command = command_of(questions, row)
        print(f"{row}: d3etr {shlex.join(command)}", file=sys.stderr)
        try:
            answer = None if options.dry_run else ask(command)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on", file=sys.stderr)
            return INTERRUPTED
        if answer is not None:
            found[row] = answer
    if options.dry_run:
        return 0
    command = ["python", "sweeps/verdicts.py", str(options.file)]
    write_files(questions, found, options.table, shlex.join(command))
    return int(len(found) < len(questions.verdicts))


def write_files(
    questions: Questions, found: Mapping[str, Record], folder: Path, command: str
) -> None:
    """Table, numbers and curve."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / questions.name
    shared = {row: _without_folders(each) for row, each in found.items()}
    write_text(stem.with_suffix(".json"), json.dumps(shared, indent=1) + "\n")
    write_text(stem.with_suffix(".md"), as_markdown(questions, found, command))
    if questions.along and found:
        draw(questions, found, stem.with_suffix(".svg"))
    print(f"{stem.with_suffix('.md')}: {len(found)} of {len(questions.verdicts)} verdicts")


def _without_folders(found: Record) -> Record:
    """A verdict without the folders of its runs, which are this machine's alone."""
    contenders = [{k: v for k, v in each.items() if k != "runs"} for each in found["contenders"]]
    return {**found, "contenders": contenders}


if __name__ == "__main__":
    sys.exit(main())
