"""Whether ``d3etr verdict`` finds a gain where there is none, on real runs.

    PYTHONPATH=platform:tests python -m benchmarks.judge_controls [--verdicts 20] [--table FOLDER]

Two teachers from which nothing is to be had: one whose class scores belong to other classes, and
one that is no better than the student's rival, as it is a plain student that was trained as long.
For each, many seeds are trained once and shared out among verdicts, of which each sees its own.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import d3etr
from d3etr.cli.progress import print_progress
from d3etr.config.load import load_config
from d3etr.config.overrides import as_overrides
from d3etr.detectors.weights import load_weights, save_weights
from d3etr.engine.find_run import absolute_paths
from d3etr.files import write_text
from d3etr.storage.fetch import local_file
from d3etr.verdict.found import Ran
from d3etr.verdict.judging import Trained, judge_runs
from d3etr.verdict.run import Question, run_verdict
from d3etr.verdict.stages import WARM_UP_SHARE

RECIPE = Path("digits/d3etr")
FOLDER = Path("runs/judge-controls")
CONTROLS = ("classes permuted", "no better than the student")


def permuted(weights: Path, file: Path) -> Path:
    """A teacher that says of every class what it knows of the next one."""
    detector, info = load_weights(weights)
    state = detector.state_dict()
    for name in ("class_head.weight", "class_head.bias"):
        state[name] = state[name].roll(1, 0)
    detector.load_state_dict(state)
    save_weights(file, detector, info)
    return file


def no_better(steps: int) -> Path:
    """The weights of a plain student that is trained as long as its rival."""
    settings = {"optimisation.steps": steps, "run.name": "no-better", "run.seed": 1000}
    settings |= {"run.output": FOLDER, "tracking.enabled": False}
    settings["optimisation.schedule.warmup_steps"] = min(100, steps // WARM_UP_SHARE)
    return d3etr.train("digits/inherited", **settings).weights


def ask(weights: Path, minutes: float, seeds: int) -> tuple[tuple[str, ...], Sequence[Ran]]:
    """Train all contenders with every seed.

    Returns:
        The overrides of all contenders, and their runs.
    """
    settings = {"teacher.weights": weights, "teacher.minimum_mAP": 0.0}
    overrides = as_overrides(settings | {"run.output": FOLDER, "tracking.enabled": False})
    question = Question(RECIPE, tuple(overrides), minutes, seeds, (0.33, 1.0), False, None, {}, "")
    found = run_verdict(question, print_progress)
    assert found.final is not None
    return question.overrides, found.final.ran


def answers(overrides: Sequence[str], ran: Sequence[Ran], verdicts: int, seeds: int) -> list[str]:
    """What each verdict says that sees its own seeds only."""
    config = absolute_paths(load_config(RECIPE, overrides))
    said = []
    for number in range(verdicts):
        own = slice(number * seeds, (number + 1) * seeds)
        trained = [
            Trained(
                each.entry.way.name, each.entry.way.distilled, each.maps[own], each.weights[own]
            )
            for each in ran
        ]
        best = judge_runs(config, "test", trained).best_distilled
        assert best is not None and best.gain is not None
        said.append(best.gain.answer)
        print(f"verdict {number + 1}: {best.gain.answer}", file=sys.stderr)
    return said


def as_table(said: Mapping[str, Sequence[str]], options: argparse.Namespace) -> str:
    """Markdown."""
    command = "PYTHONPATH=platform:tests python -m benchmarks.judge_controls"
    lines = [
        "# The judge of `d3etr verdict` where there is no gain",
        "",
        f"`{command} --verdicts {options.verdicts} --seeds {options.seeds} "
        f"--minutes {options.minutes:g}`",
        "",
        f"Verdicts on `{RECIPE}` with other teachers, {options.seeds} seeds each, of "
        f"{options.minutes:g} minutes a run. Asked: no gain in 19 of 20.",
        "",
        "| teacher | gain | open | loss |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, answers_of in said.items():
        counts = Counter(answers_of)
        cells = " | ".join(str(counts[answer]) for answer in ("gain", "open", "loss"))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verdicts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="of each contender in a verdict")
    parser.add_argument("--minutes", type=float, default=0.25, help="of each run")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write judge-controls.md")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    seeds = options.verdicts * options.seeds
    own = load_config(RECIPE).teacher
    assert own is not None and own.weights is not None
    with local_file(own.weights) as file:
        wrong = permuted(file, FOLDER / "permuted.safetensors")
    overrides, ran = ask(wrong, options.minutes, seeds)
    said = {CONTROLS[0]: answers(overrides, ran, options.verdicts, options.seeds)}
    steps = next(each.entry.steps for each in ran if not each.entry.way.distilled)
    overrides, ran = ask(no_better(steps), options.minutes, seeds)
    said[CONTROLS[1]] = answers(overrides, ran, options.verdicts, options.seeds)
    table = as_table(said, options)
    if options.table is not None:
        write_text(options.table / "judge-controls.md", table)
    print(table)


if __name__ == "__main__":
    main()
