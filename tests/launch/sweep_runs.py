"""A sweep run from a test, and what its trials did."""

from collections.abc import Callable
from pathlib import Path

from d3etr.engine.journal import read_journal
from d3etr.launch.sweeps.driver import SweepResult, run_sweep
from d3etr.launch.sweeps.plan import Plan

RATE = "optimisation.learning_rate"
MakePlan = Callable[..., Plan]


def run(plan: Plan) -> tuple[SweepResult, list[str]]:
    said: list[str] = []
    return run_sweep(plan, command="test", on_progress=said.append), said


def steps(run_dir: Path, kind: str = "step") -> list[int]:
    return [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == kind]
