"""A verdict from a recipe to an answer: costs, rates, early runs, full runs, judgement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d3etr.config.load import config_digest
from d3etr.config.location import Location
from d3etr.config.tree import Config
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.find_run import absolute_paths
from d3etr.engine.step_costs import StepCosts, measure_step_costs
from d3etr.errors import RunFailedError
from d3etr.evaluation.judge import FEWEST_SEEDS
from d3etr.files import clear_disk_errors, read_json, write_text
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.remote import on_a_worker
from d3etr.launch.resources import demand_of, room
from d3etr.launch.sweeps.driver import run_sweep
from d3etr.launch.sweeps.plan import make_plan
from d3etr.launch.sweeps.results import TrialResult
from d3etr.progress import OnProgress, duration
from d3etr.verdict.contenders import (
    DISTILLED,
    LABELS_FILE,
    ON_LABELS,
    PSEUDO_LABELS,
    Contest,
    Way,
    make_contest,
    with_labels,
)
from d3etr.verdict.found import Found, Ran, Stage
from d3etr.verdict.judging import SplitName, Trained, judge_runs
from d3etr.verdict.labelling import Labelled, label
from d3etr.verdict.stages import Entry, entry, sweep_of

EARLY = 0.25
"""Share of a run's steps that early runs have."""
COSTS_FILE = "costs.json"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        recipe: of the distilled student.
        overrides: on top of it, for all contenders.
        minutes: of training steps in each run, by the clock that ``d3etr compare`` uses.
        seeds: how many; the first is the recipe's.
        rates: factors on the recipe's learning rate that each contender may try.
        early: whether all run for a quarter of their steps first.
        checkpoint: the student's own weights, to be fine-tuned.
        variants: name -> overrides of the recipe; further distilled students.
        command: what repeats it.
    """

    recipe: Path
    overrides: tuple[str, ...]
    minutes: float
    seeds: int
    rates: tuple[float, ...]
    early: bool
    checkpoint: Location | None
    variants: Mapping[str, tuple[str, ...]]
    command: str


def run_verdict(question: Question, on_progress: OnProgress) -> Found:
    """Ask and answer; where it was interrupted, the same question goes on.

    Args:
        question: what is asked.
        on_progress: takes lines for a person.

    Raises:
        UserError: something that the user can fix.
        RunFailedError: the distilled student or every rival failed.
        RunInterrupted: Ctrl-C or a termination signal.
    """
    contest = make_contest(
        question.recipe, question.overrides, question.checkpoint, question.variants
    )
    base = absolute_paths(contest.ways[-1].config)
    with connected(base.cluster, on_progress):
        return _Verdict(question, contest, base, on_progress).find()


class _Verdict:
    """The steps of a verdict, one after the other; Ray is connected."""

    def __init__(
        self, question: Question, contest: Contest, base: Config, on_progress: OnProgress
    ) -> None:
        self._question, self._contest, self._base = question, contest, base
        self._say, self._failed = on_progress, list[str]()
        self._seconds = 60 * question.minutes
        self._seeds = tuple(base.run.seed + k for k in range(question.seeds))
        self._folder = base.run.output / f"{base.run.name}-verdict-{_digest(question, contest)}"

    def find(self) -> Found:
        """The answer."""
        labelled = self._label()
        costs = self._costs(0.0 if labelled is None else labelled.seconds)
        left_out = self._contest.left_out | costs.refused
        if DISTILLED in costs.refused:
            raise RunFailedError(f"the distilled student cannot train: {left_out[DISTILLED]}")
        ways = [way for way in self._contest.ways if way.name in costs.seconds]
        self._announce(ways, costs, left_out)
        entries = [
            entry(way, rate, self._seconds, costs.seconds[way.name], costs.prepared[way.name])
            for way in ways
            for rate in self._question.rates
        ]
        found = Found(self._question.command, self._folder, self._question.minutes, costs, left_out)
        if len(self._question.rates) > 1 or self._question.early:
            entries, found = self._early(entries, found)
        if any(each.way.distilled for each in entries):  # else nobody is left to find a gain for
            split: SplitName = "test" if _has_test(self._base) else "validation"
            final = self._train("final", {each.way.name: each for each in entries}, self._seeds)
            found = replace(found, final=self._judged(final, split))
        return replace(found, failed=tuple(self._failed))

    def _label(self) -> Labelled | None:
        """Let the teacher label images without labels, where somebody is to train on them."""
        contest, question, file = self._contest, self._question, self._folder / LABELS_FILE
        ways = [way for way in contest.ways if way.name == PSEUDO_LABELS]
        if not ways:
            return None
        self._say("labelling images without labels by the teacher")
        start = absolute_paths(ways[0].config)
        found = on_a_worker(self._base.cluster, label, self._base, start, file)
        if isinstance(found, str):
            self._contest = contest.without_labels(found)
            return None
        self._contest = with_labels(
            contest, question.recipe, question.overrides, file, inherits=found.inherits
        )
        self._say(
            f"{PSEUDO_LABELS}: {found.boxes:,} boxes on {found.images:,} images, score at least "
            f"{found.threshold:.3f}, the best on validation, in {found.seconds:.3g} s; the student "
            f"starts {'from the teacher' if found.inherits else 'anew'}"
        )
        return found

    def _costs(self, labelling: float) -> StepCosts:
        """Measured once: the steps of a verdict that goes on are those that it began with.

        Who was refused then is measured again, as the reason may be gone.

        Args:
            labelling: seconds that the teacher took for its labels.
        """
        file = self._folder / COSTS_FILE
        known = StepCosts(**read_json(file)) if file.exists() else StepCosts({}, {}, {})
        configs = {
            way.name: absolute_paths(way.config)
            for way in self._contest.ways
            if way.name not in known.seconds
        }
        if not configs:
            return known
        whose = ", ".join(configs) if known.seconds else "each contender"
        self._say(f"measuring what a step of {whose} costs")
        costs = on_a_worker(self._base.cluster, _measure, configs)
        for name in ON_LABELS:
            if name in costs.prepared:
                costs.prepared[name] += labelling
        seconds, prepared = known.seconds | costs.seconds, known.prepared | costs.prepared
        costs = StepCosts(seconds, prepared, costs.refused)
        with clear_disk_errors("the verdict", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(vars(costs), indent=1) + "\n")
        return costs

    def _announce(self, ways: Sequence[Way], costs: StepCosts, left_out: dict[str, str]) -> None:
        """Costs, steps and the forecast, before anything takes long."""
        plain = min(costs.seconds.values())
        for way in ways:
            cost, before = costs.seconds[way.name], costs.prepared[way.name]
            steps = max(0, round((self._seconds - before) / cost))
            less = f" less {before:.3g} s before the first" if before else ""
            self._say(
                f"{way.name}: a step takes {1000 * cost:.1f} ms ({cost / plain:.2f} of the "
                f"cheapest), {steps:,} steps in {self._question.minutes:g} minutes{less}"
            )
        for name, reason in left_out.items():
            self._say(f"{name} does not take part: {reason}")
        tried = len(ways) * len(self._question.rates) * self._early_seeds
        several = len(self._question.rates) > 1 or self._question.early
        runs = len(ways) * len(self._seeds) + (EARLY * tried if several else 0)
        nodes = cluster_nodes()
        demand = demand_of(self._base.cluster, nodes)
        at_a_time = max(1, room(nodes, demand.cpus, demand.gpus) // demand.workers)
        total = runs * self._seconds
        self._say(
            f"forecast: {duration(total)} of training in all, {at_a_time} runs at a time: about "
            f"{duration(total / at_a_time)}, and the evaluations"
        )

    @property
    def _early_seeds(self) -> int:
        """Rates are chosen by one seed; an early judgement needs several."""
        return len(self._seeds) if self._question.early else 1

    def _early(self, entries: Sequence[Entry], found: Found) -> tuple[list[Entry], Found]:
        """Choose rates by short runs, and stop what cannot win any more."""
        question = self._question
        short = {  # of steps: what a teacher did before them serves the whole run
            each.title: replace(each, steps=max(1, round(EARLY * each.steps))) for each in entries
        }
        ran = self._train("early", short, self._seeds[: self._early_seeds])
        best = dict[str, Ran]()
        for each in ran:
            name = each.entry.way.name
            if name not in best or each.validation > best[name].validation:
                best[name] = each
        chosen = list(best.values())
        rates = {name: each.entry.rate for name, each in best.items()}
        for name, rate in rates.items() if len(question.rates) > 1 else ():
            self._say(f"{name}: learning rate x {rate:g} was best on validation")
        stage = None
        if question.early:
            stage = self._judged(chosen, "validation")
            self._say(f"early, after {EARLY:g} of the steps: {stage.sentence}")
            for name in stage.stopped:
                self._say(f"{name} is stopped: it cannot win any more")
        kept = [
            each
            for each in entries
            if rates.get(each.way.name) == each.rate
            and (stage is None or each.way.name not in stage.stopped)
        ]
        return kept, replace(found, early=stage, rates=rates if len(question.rates) > 1 else {})

    def _train(self, stage: str, entries: dict[str, Entry], seeds: Sequence[int]) -> list[Ran]:
        """Train entries with all seeds; what failed is left out with a line."""
        question = self._question
        plan = make_plan(sweep_of(stage, question.recipe, question.overrides, entries, seeds))
        result = run_sweep(plan, command=question.command, on_progress=self._say)
        ran = []
        for title, each in entries.items():
            own = [trial for trial in result.trials if trial.trial.case == title]
            done = [trial for trial in own if trial.state == "finished" and trial.mAP is not None]
            failed = [trial.reason or trial.state for trial in own if trial not in done]
            for reason in failed:
                self._say(f"{title} failed: {reason}")
            if failed:
                finished = f"{len(done)} of {len(own)} {stage} runs of '{title}' finished"
                self._failed.append(f"{finished}: {failed[0]}")
            if len(done) >= min(len(seeds), FEWEST_SEEDS):
                ran.append(Ran(each, tuple(done)))
        self._require_both(ran, result.trials)
        return ran

    def _require_both(self, ran: Sequence[Ran], trials: Sequence[TrialResult]) -> None:
        """There is a verdict only where somebody distilled and somebody else did not."""
        if {each.entry.way.distilled for each in ran} == {True, False}:
            return
        reasons = [trial.reason for trial in trials if trial.reason] or ["no reason is known"]
        raise RunFailedError(f"too few runs finished for a verdict: {reasons[0]}")

    def _judged(self, ran: Sequence[Ran], split: SplitName) -> Stage:
        self._say(f"measuring {sum(len(each.trials) for each in ran)} students on {split}")
        trained = [
            Trained(each.entry.way.name, each.entry.way.distilled, each.maps, each.weights)
            for each in ran
        ]
        judgement = on_a_worker(self._base.cluster, judge_runs, self._base, split, trained)
        return Stage(split, tuple(ran), judgement)


def _measure(configs: dict[str, Config]) -> StepCosts:
    return measure_step_costs(configs, SingleProcess())


def _has_test(config: Config) -> bool:
    return config.data.digit_scenes is not None or config.data.test is not None


def _digest(question: Question, contest: Contest) -> str:
    content = [
        question.minutes,
        question.seeds,
        question.rates,
        question.early,
        *((way.name, config_digest(way.config)) for way in contest.ways),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
