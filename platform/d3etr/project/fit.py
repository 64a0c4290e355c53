"""How many steps of each recipe fit into the time, and which sizes leave enough of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from d3etr.config.overrides import Tree
from d3etr.errors import UserError
from d3etr.progress import OnProgress, duration
from d3etr.project.measure import Costs, DoesNotFit, Measure, storing_problem
from d3etr.project.recipes import (
    DISTILLED,
    EVALUATIONS,
    INHERITED,
    PLAIN,
    ROLES,
    TEACHER,
    Design,
    project_trees,
)
from d3etr.project.sizes import Rung
from d3etr.project.survey import Survey

SHARES = {TEACHER: 0.46, PLAIN: 0.18, INHERITED: 0.18, DISTILLED: 0.18}
"""Of the time: a teacher must lead, and its steps cost more; students have the same time. With 0.15
each, students of small objects ended at a third of their teacher (docs/init.md)."""
START_SECONDS = 20.0
"""From a command to its first step, and from the last step to its end, together."""
FEWEST_STEPS = 50
VIEWS, STEP_WITH_VIEWS = 4, 1.15
"""Augmentations of an image whose passes are stored, and what a step costs then in plain ones (our
choice and measurement: docs/results.md)."""
PLACEHOLDER = dict.fromkeys(ROLES, 1000)
"""Lengths of recipes of which only single steps are made."""


@dataclass(frozen=True)
class Plan:
    """What fits into the time.

    Attributes:
        minutes: asked for, all four runs together.
        rung: the sizes that were chosen.
        design: what is trained.
        costs: of each role's steps and evaluations.
        steps: of each role.
        doubts: what speaks against success, a sentence each.
    """

    minutes: float
    rung: Rung
    design: Design
    costs: dict[str, Costs]
    steps: dict[str, int]
    doubts: tuple[str, ...] = ()

    def seconds(self, role: str) -> float:
        """Of a whole run, from its command to its end."""
        return run_seconds(self.steps[role], self.costs[role], self.design.test)


def run_seconds(steps: int, costs: Costs, test: bool) -> float:
    """Seconds of a run with its start, evaluations and end.

    Args:
        steps: optimiser steps.
        costs: of one.
        test: whether the test split is measured too, as long as an evaluation takes.
    """
    around = START_SECONDS + costs.preparation + (EVALUATIONS + 1 + test) * costs.evaluation
    return around + steps * costs.step


def steps_within(seconds: float, costs: Costs, test: bool) -> int:
    """How many steps a run has time for; 0 where not even evaluations fit."""
    return max(0, int((seconds - run_seconds(0, costs, test)) / costs.step))


def fit(
    found: Survey,
    minutes: float,
    rungs: Mapping[Rung, Design],
    data: Tree,
    measure: Measure,
    runs: Path,
    on_progress: OnProgress,
) -> Plan:
    """Choose the largest sizes that leave a student enough steps, by steps made here.

    Args:
        found: the data set.
        minutes: for all four runs.
        rungs: sizes, the largest first, and what they make.
        data: ``data.train`` and the other splits, as they can be read now.
        measure: makes steps.
        runs: the folder that will hold the project's runs.
        on_progress: called with what is measured.

    Raises:
        UserError: no choice leaves a student more than a few steps.
    """
    best: tuple[int, Rung, Costs] | None = None
    for rung, design in rungs.items():
        costs = _costs(found, design, data, PLAIN, measure)
        if costs is None:
            on_progress(f"batches of {rung.batch} images do not fit into the GPU's memory")
            continue
        steps = steps_within(60 * minutes * SHARES[PLAIN], costs, design.test)
        on_progress(
            f"images of {rung.side} pixels, {rung.batch} in a step: {1000 * costs.step:.0f} ms a "
            f"step, so {steps:,} steps of a student (at least {rung.steps:,} are wanted)"
        )
        best = (steps, rung, costs)
        if steps >= rung.steps:
            break
    if best is None or best[0] < FEWEST_STEPS:
        raise UserError(_too_short(minutes, best))
    _, rung, plain = best
    chosen = rung, rungs[rung]
    return _planned(found, minutes, chosen, plain, data, measure, runs, on_progress)


def _planned(
    found: Survey,
    minutes: float,
    chosen: tuple[Rung, Design],
    plain: Costs,
    data: Tree,
    measure: Measure,
    runs: Path,
    on_progress: OnProgress,
) -> Plan:
    """The lengths of all four runs at chosen sizes; ``plain`` is what a plain student costs."""
    rung, design = chosen
    taken = {PLAIN: plain, INHERITED: plain}
    for role in (TEACHER, DISTILLED):
        measured = _costs(found, design, data, role, measure)
        if measured is None:
            raise UserError(
                f"the {role}'s steps of {rung.batch} images do not fit into the GPU's memory: use "
                "a GPU with more"
            )
        on_progress(f"{role}: {1000 * measured.step:.0f} ms a step")
        taken[role] = measured
    seconds = 60 * minutes * SHARES[DISTILLED]
    stored = with_views(taken[PLAIN], taken[DISTILLED], found.statistics.images, rung.batch)
    if design.start is None and steps_within(seconds, stored, design.test) > steps_within(
        seconds, taken[DISTILLED], design.test
    ):
        wanted, train = replace(design, views=VIEWS), found.splits["train"]
        problem = storing_problem(project_trees(wanted, data, PLACEHOLDER), train, runs)
        if problem is None:
            design, taken[DISTILLED] = wanted, stored
            on_progress(f"the teacher's passes over {VIEWS} views of each image are stored")
        else:
            on_progress(f"the teacher is in every step, as its passes cannot be stored: {problem}")
    lengths = {
        role: max(1, steps_within(60 * minutes * SHARES[role], taken[role], design.test))
        for role in ROLES
    }
    plan = Plan(minutes, rung, design, taken, lengths)
    return Plan(minutes, rung, design, taken, lengths, tuple(_doubts(plan)))


def with_views(plain: Costs, distilled: Costs, images: int, batch: int) -> Costs:
    """What a distilled student costs whose teacher's passes are stored before it trains.

    Args:
        plain: of a student without a teacher.
        distilled: with the teacher in every step, which is what such a step costs more.
        images: of the training split.
        batch: images in a step.
    """
    of_an_image = max(0.0, distilled.step - plain.step) / batch
    return replace(
        distilled, step=STEP_WITH_VIEWS * plain.step, preparation=VIEWS * images * of_an_image
    )


def _costs(found: Survey, design: Design, data: Tree, role: str, measure: Measure) -> Costs | None:
    """None where the GPU has too little memory."""
    try:
        return measure(project_trees(design, data, PLACEHOLDER), role, found.splits)
    except DoesNotFit:
        return None


def _too_short(minutes: float, best: tuple[int, Rung, Costs] | None) -> str:
    if best is None:
        return "not even the smallest batches fit into the GPU's memory: use a GPU with more"
    steps, rung, costs = best
    needed = run_seconds(rung.steps, costs, test=True) / SHARES[PLAIN]
    return (
        f"--minutes {minutes:g} are {steps} steps of a student, of which each takes "
        f"{costs.step:.2g} s here; expected at least {FEWEST_STEPS}, and {rung.steps:,} to learn "
        f"something: give --minutes {needed / 60:.0f}"
    )


def _doubts(plan: Plan) -> list[str]:
    """Why students, or the teacher, may not learn enough in this time."""
    doubts = []
    if any(costs.busy for costs in plan.costs.values()):
        doubts.append(
            "other programs used the processor while steps were measured, so that there is time "
            "for more steps once they end: run init again then"
        )
    if plan.steps[PLAIN] < plan.rung.steps:
        needed = run_seconds(plan.rung.steps, plan.costs[PLAIN], plan.design.test)
        doubts.append(
            f"{plan.minutes:g} minutes are {plan.steps[PLAIN]:,} steps of a student; about "
            f"{plan.rung.steps:,} are needed to learn something: --minutes "
            f"{needed / SHARES[PLAIN] / 60:.0f} would do"
            if plan.design.start is None
            else f"{plan.steps[PLAIN]:,} steps are few: better {plan.rung.steps:,}"
        )
    if plan.steps[TEACHER] < plan.steps[PLAIN]:
        doubts.append(
            f"the teacher has fewer steps ({plan.steps[TEACHER]:,}) than the student "
            f"({plan.steps[PLAIN]:,}); if it does not lead, distilling gains nothing"
        )
    return doubts


def overview(plan: Plan) -> list[tuple[str, int, str]]:
    """Role, steps and time of each run."""
    return [(role, plan.steps[role], duration(plan.seconds(role))) for role in ROLES]
