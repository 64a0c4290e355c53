"""What a sweep found, and its files: itself, the table, the results, the best recipe."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from d3etr.config.load import to_yaml
from d3etr.config.sweep import SweepConfig
from d3etr.config.yaml_text import dump_yaml
from d3etr.engine.find_run import find_folder, folder_of
from d3etr.engine.journal import read_journal
from d3etr.engine.provenance import Inputs
from d3etr.engine.run_folder import RunFolder, is_number
from d3etr.files import write_text
from d3etr.launch.sweeps.plan import SWEEP_FILE, Plan
from d3etr.launch.sweeps.trials import Trial

RESULTS_FILE, TABLE_FILE, BEST_FILE = "results.json", "table.md", "best.yaml"
State = Literal["finished", "pruned", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        trial: which.
        state: finished; pruned (stopped early); failed; or unfinished.
        run_dir: its run's folder; None if it never began.
        summary: of the finished run: metrics as in summary.json.
        mAP: newest on the validation split, None if never evaluated.
        epoch: at which that was.
        reason: why it failed.
    """

    trial: Trial
    state: State
    run_dir: Path | None = None
    summary: dict[str, Any] | None = None
    mAP: float | None = None
    epoch: int | None = None
    reason: str | None = None

    def metric(self, name: str) -> float | None:
        """A number of the finished run, None if it is not finished or has no such number."""
        value = None if self.summary is None else self.summary.get(name)
        return value if is_number(value) else None


def ended_before(plan: Plan, trials: Iterable[Trial]) -> dict[int, TrialResult]:
    """Results of trials that need no training, by number: finished, or stopped early before.

    Raises:
        UserError: a trial was trained from other files.
    """
    inputs, ended = Inputs(), dict[int, TrialResult]()
    for trial in trials:
        config = plan.config(trial)
        own = folder_of(config)
        if own.result() is not None:
            inputs.ensure_result_is_of(plan.placed(config), own.path)
        twin = plan.finished_twin(config, inputs)
        if twin is not None:
            ended[trial.number] = finished(trial, twin)
        elif _pruned_file(plan, trial).exists():
            ended[trial.number] = _pruned(trial, own.path)
    return ended


def finished(trial: Trial, run_dir: Path) -> TrialResult:
    """The result of a trial whose run has finished."""
    summary = RunFolder(run_dir).read_summary() or {}
    mAP = summary.get("mAP")
    known = float(mAP) if is_number(mAP) else None
    return TrialResult(trial, "finished", run_dir, summary, known, reached_epoch(run_dir))


def keep_as_pruned(plan: Plan, trial: Trial, run_dir: Path) -> TrialResult:
    """The result of a trial that was stopped early; a later start leaves it at that."""
    write_text(_pruned_file(plan, trial), "")
    return _pruned(trial, run_dir)


def _pruned_file(plan: Plan, trial: Trial) -> Path:
    return plan.folder / f"{trial.number:03d}.pruned"


def _pruned(trial: Trial, run_dir: Path) -> TrialResult:
    epoch, mAP = (curve_of(run_dir) or [(0, 0.0)])[-1]
    return TrialResult(trial, "pruned", run_dir, None, mAP, epoch)


def curve_of(run_dir: Path) -> list[tuple[int, float]]:
    """Epochs and mAP of a run's evaluations at the end of its epochs, and at its end."""
    curve: list[tuple[int, float]] = []
    steps, per_epoch = 0, 1
    for record in read_journal(RunFolder(run_dir).journal):
        step = record["step"]
        if record["kind"] == "start":
            steps, per_epoch = record["steps"], record.get("steps_per_epoch") or per_epoch
        elif record["kind"] == "evaluation" and "val/mAP" in record["metrics"]:
            if step % per_epoch == 0 or step == steps:
                curve.append((-(-step // per_epoch), record["metrics"]["val/mAP"]))
    return curve


def reached_epoch(run_dir: Path) -> int:
    """The epoch at which a run was last evaluated."""
    return max((epoch for epoch, _ in curve_of(run_dir)), default=1)


def best(results: Sequence[TrialResult]) -> TrialResult | None:
    """The finished trial with the highest validation mAP; the first of equal ones."""
    finished = [r for r in results if r.state == "finished" and r.mAP is not None]
    return max(finished, key=lambda r: r.mAP or 0.0, default=None)


def table_metric(results: Sequence[TrialResult]) -> str:
    """The metric that is published: of the test split where every finished trial has it."""
    finished = [result for result in results if result.state == "finished"]
    has = bool(finished) and all(result.metric("test/mAP") is not None for result in finished)
    return "test/mAP" if has else "mAP"


def table(sweep: SweepConfig, results: Sequence[TrialResult]) -> str:
    """The sweep as a Markdown table, in percent: a row for each configuration over its seeds.

    Where the test split is published, validation mAP has a column of its own: it is what the best
    was chosen by, whose row is bold.
    """
    metric, gains = table_metric(results), any(sweep.baseline_of(case) for case in sweep.cases)
    rows: dict[str, list[TrialResult]] = {}
    for result in results:
        trial = result.trial
        proposal = trial.number if sweep.search.method == "optuna" else None
        rows.setdefault(repr((proposal, trial.case, trial.point)), []).append(result)
    values = {key: _values(row, metric) for key, row in rows.items()}
    means = {key: statistics.fmean(found) for key, found in values.items() if found}
    of_case = {rows[key][0].trial.case: mean for key, mean in reversed(means.items())}
    winner, chosen = best(results), metric != "mAP"
    lines = [
        f"| configuration | steps |{' validation mAP |' * chosen} "
        f"{metric if chosen else 'validation mAP'} by seed | mean | spread |" + " gain |" * gains,
        f"| --- | ---: |{' ---: |' * chosen} --- | ---: | ---: |" + " ---: |" * gains,
    ]
    for key, row in rows.items():
        base = of_case.get(sweep.baseline_of(row[0].trial.case) or "")
        gain = "" if base is None or key not in means else f"{100 * (means[key] - base):+.1f}"
        title = _title(sweep, row[0].trial)
        title = f"**{title}**" if any(result is winner for result in row) else title
        line = _line(title, row, metric, _values(row, "mAP") if chosen else None)
        lines.append(line + f" {gain} |" * gains)
    return "\n".join(lines)


def best_line(sweep: SweepConfig, results: Sequence[TrialResult]) -> str:
    """The best trial in a sentence; "" where none finished."""
    winner = best(results)
    if winner is None or winner.mAP is None:
        return ""
    tested = winner.metric("test/mAP")
    test = "" if tested is None else f", {100 * tested:.1f} on test"
    mAP = f"{100 * winner.mAP:.1f} mAP on validation, by which it was chosen{test}"
    return f"best: {winner.trial.label(sweep) or sweep.name}: {mAP}"


def closing_lines(sweep: SweepConfig, results: Sequence[TrialResult]) -> list[str]:
    """What stands below the table: the best trial, and which keys matter."""
    from d3etr.launch.sweeps.importance import importance_line  # imports Optuna and scikit-learn

    return [*filter(None, [best_line(sweep, results), importance_line(sweep, results)])]


def _values(row: Sequence[TrialResult], metric: str) -> list[float]:
    return [value for result in row if (value := result.metric(metric)) is not None]


def _title(sweep: SweepConfig, trial: Trial) -> str:
    title = trial.title(sweep.model_copy(update={"seeds": (trial.seed,)}))
    return title if sweep.search.method != "optuna" else f"{trial.number}: {title}"


def _line(
    title: str, row: Sequence[TrialResult], metric: str, chosen_by: Sequence[float] | None
) -> str:
    """A row; ``chosen_by`` is what stands before the published numbers, None where they do."""
    values = _values(row, metric)
    by_seed = sorted(row, key=lambda result: result.trial.seed)
    cells = " / ".join(_cell(result, metric) for result in by_seed)
    if chosen_by is not None:
        mean = f"{100 * statistics.fmean(chosen_by):.1f}" if chosen_by else ""
        cells = f"{mean} | {cells}"
    if not values:
        return f"| {title} | | {cells} | | |"
    steps = int(max(result.metric("steps") or 0 for result in row))
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    numbers = f"{100 * statistics.fmean(values):.1f} | {100 * spread:.1f}"
    return f"| {title} | {steps:,} | {cells} | {numbers} |"


def _cell(result: TrialResult, metric: str) -> str:
    """A trial's number; of one that was stopped early, validation mAP at that epoch."""
    value = result.metric(metric)
    if value is not None:
        return f"{100 * value:.1f}"
    if result.state == "pruned" and result.mAP is not None:
        return f"stopped at epoch {result.epoch} with {100 * result.mAP:.1f}"
    return result.state


def failures(sweep: SweepConfig, results: Sequence[TrialResult]) -> list[str]:
    """Why trials failed, a line each."""
    return [
        f"{result.trial.title(sweep)}: {(result.reason or '').partition(chr(10))[0]}"
        for result in results
        if result.state == "failed"
    ]


def as_json(sweep: SweepConfig, results: Sequence[TrialResult], command: str) -> dict[str, Any]:
    """The sweep as plain values, with the command that repeats it."""
    from d3etr.launch.sweeps.importance import importances  # imports Optuna and scikit-learn

    return {
        "name": sweep.name,
        "title": sweep.title,
        "command": command,
        "importance": importances(sweep, results),
        "trials": [_trial_json(result) for result in results],
    }


def _trial_json(result: TrialResult) -> dict[str, Any]:
    return {
        "number": result.trial.number,
        "case": result.trial.case,
        "point": result.trial.point,
        "seed": result.trial.seed,
        "state": result.state,
        "run": None if result.run_dir is None else result.run_dir.name,
        "mAP": result.mAP,
        "epoch": result.epoch,
        "reason": result.reason,
        "summary": result.summary,
    }


def write_sweep(plan: Plan) -> None:
    """Keep the sweep, so that it can be resumed by name."""
    tree = json.loads(plan.sweep.model_dump_json(exclude_unset=True))
    write_text(plan.folder / SWEEP_FILE, dump_yaml(tree))


def write_results(plan: Plan, results: Sequence[TrialResult], command: str) -> list[Path]:
    """Write table, results and the best recipe; returns these files and the sweep's."""
    markdown, data, recipe = (plan.folder / name for name in (TABLE_FILE, RESULTS_FILE, BEST_FILE))
    write_table(plan.sweep, results, command, markdown, data)
    winner = best(results)
    if winner is not None:
        write_text(recipe, best_recipe(plan, winner))
    return [plan.folder / SWEEP_FILE, markdown, data, *([recipe] if winner is not None else [])]


def write_table(
    sweep: SweepConfig, results: Sequence[TrialResult], command: str, markdown: Path, data: Path
) -> None:
    """Write the table under its title with the command that makes it, and every trial as JSON.

    Below the table stand the best trial, which keys matter, and why trials failed.
    """
    text = f"# {sweep.title or sweep.name}\n\n`{command}`\n\n{table(sweep, results)}\n"
    text += "".join(f"\n{line[0].upper()}{line[1:]}\n" for line in closing_lines(sweep, results))
    failed = "".join(f"- failed: {line}\n" for line in failures(sweep, results))
    write_text(markdown, f"{text}\n{failed}" if failed else text)
    write_text(data, json.dumps(as_json(sweep, results, command), indent=1) + "\n")


def best_recipe(plan: Plan, winner: TrialResult) -> str:
    """The winner's configuration as a recipe that is ready to run."""
    config = plan.config(winner.trial)
    run = config.run.model_copy(update={"name": f"{plan.sweep.name}-best", "output": Path("runs")})
    comment = f"# {winner.trial.title(plan.sweep)}: the best of sweep {plan.folder.name}\n"
    return comment + to_yaml(config.model_copy(update={"run": run}))


def find_sweep(name: str, output: Path) -> Path:
    """The folder of a sweep: a path, or the beginning of its name in ``output``.

    Raises:
        UserError: none or several fit; the text lists them.
    """
    return find_folder(name, output, SWEEP_FILE, "sweep")
