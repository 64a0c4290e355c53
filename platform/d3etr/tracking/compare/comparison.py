"""Runs side by side: what they reached, what it cost, how they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from d3etr.config.tree import Config
from d3etr.engine.run_folder import WEIGHTS_FILE
from d3etr.errors import UserError
from d3etr.tracking.compare.equal_time import CLOCKS, at_equal_time
from d3etr.tracking.compare.folders import FinishedRun, find_folders, read_run
from d3etr.tracking.compare.labels import distinct_labels
from d3etr.tracking.description import recipe_name

METRICS = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
COSTS = ("parameters", "images_per_second", *CLOCKS, "steps")


@dataclass(frozen=True)
class Spread:
    """Mean over runs, and the sample deviation; None for a single run."""

    mean: float
    deviation: float | None
    count: int

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"mean": self.mean, "deviation": self.deviation, "runs": self.count}


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed only.

    Attributes:
        runs: at least one, by seed.
        prefix: of the metrics' keys in the summaries: "" (validation) or "test/".
        label: unique in the comparison.
    """

    runs: tuple[FinishedRun, ...]
    prefix: str
    label: str

    @property
    def title(self) -> str:
        """Teacher, plain student, D3ETR student."""
        return self.runs[0].title

    @property
    def distils(self) -> bool:
        """Whether they were distilled from a teacher."""
        return self.runs[0].config.distillation.method != "none"

    @property
    def name(self) -> str:
        """The runs' own name."""
        return self.runs[0].name

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds."""
        return tuple(run.seed for run in self.runs)

    def metric(self, name: str) -> Spread | None:
        """A metric of the split that is compared, as a fraction."""
        return self._spread(lambda run: run.number(self.prefix + name))

    def cost(self, name: str) -> Spread | None:
        """Another number of the summaries."""
        return self._spread(lambda run: run.number(name))

    def classes(self) -> dict[str, Spread]:
        """Class name -> average precision."""
        prefix = f"{self.prefix}AP/"
        names = [key.removeprefix(prefix) for key in self.runs[0].summary if key.startswith(prefix)]
        found = {name: self.metric(f"AP/{name}") for name in names}
        return {name: spread for name, spread in found.items() if spread is not None}

    def curve(self) -> dict[int, Spread]:
        """Optimiser step -> validation mAP there, at the steps where all runs were measured."""
        measured = [dict(run.curve) for run in self.runs if run.curve]
        shared = set.intersection(*(set(each) for each in measured)) if measured else set()
        if not shared:  # measured at different steps: a mean would be of nothing
            measured = measured[:1]
            shared = set(measured[0]) if measured else set()
        return {
            step: Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))
            for step in sorted(shared)
            if (values := [each[step] for each in measured])
        }

    def gain_over(self, other: RunGroup) -> Spread | None:
        """Gain in mAP over another group; seed by seed where both have the same seeds."""
        if self.seeds == other.seeds:
            pairs = zip(self.runs, other.runs, strict=True)
            gains = [_difference(one, two, f"{self.prefix}mAP") for one, two in pairs]
            return _spread([gain for gain in gains if gain is not None])
        ours, theirs = self.metric("mAP"), other.metric("mAP")
        if ours is None or theirs is None:
            return None
        return Spread(ours.mean - theirs.mean, None, min(ours.count, theirs.count))

    def _spread(self, number: Callable[[FinishedRun], float | None]) -> Spread | None:
        values = [value for run in self.runs if (value := number(run)) is not None]
        return _spread(values)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side.

    Attributes:
        groups: in the order asked for.
        baseline: what gains are measured against: the plain student, else the first group.
        split: "test" where every run was measured on it, else "validation".
    """

    groups: tuple[RunGroup, ...]
    baseline: RunGroup
    split: str

    def gain(self, group: RunGroup) -> Spread | None:
        """Gain in mAP over the baseline; None for itself and for teachers."""
        if group is self.baseline or group.title == "teacher":
            return None
        return group.gain_over(self.baseline)

    def differences(self) -> dict[str, list[str]]:
        """Settings that are not the same everywhere: dotted key -> value of each group."""
        settings = [group.runs[0].settings() for group in self.groups]
        longest_first = sorted(settings, key=len, reverse=True)
        keys = dict.fromkeys(key for each in longest_first for key in each)
        sections = {key.rpartition(".")[0] for key in keys}
        rows = {key: [each.get(key, "-") for each in settings] for key in keys}
        # A section that is null in one run only repeats its keys in the others.
        return {
            key: values
            for key, values in rows.items()
            if len(set(values)) > 1 and key not in sections
        }

    def classes(self) -> dict[str, list[Spread | None]]:
        """Class name -> average precision of each group."""
        found = [group.classes() for group in self.groups]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: [each.get(name) for each in found] for name in names}

    def cautions(self) -> list[str]:
        """Why the numbers may not be comparable, one sentence each."""
        differing = self.differences()
        found = []
        if any(key.startswith("data.") and key not in _HARMLESS for key in differing):
            found.append("The runs differ in their data or its preparation: see the differences.")
        found += [
            f"The runs did not have the same {content.removeprefix('the ')}, whatever its place is "
            "called: it was changed between them."
            for content in self._changed_contents()
        ]
        students = [group for group in self.groups if group.title != "teacher"]
        if len({group.runs[0].summary.get("steps") for group in students}) > 1:
            found.append("The students were not trained for the same number of steps.")
        if len({group.seeds for group in students}) > 1:
            found.append("The groups do not have the same seeds: gains are differences of means.")
        return found

    def _changed_contents(self) -> list[str]:
        """Data that several runs read with the same settings and that was not the same."""
        seen: dict[tuple[str, str], set[object]] = {}
        for run in (run for group in self.groups for run in group.runs):
            data = run.config.data.model_dump_json(exclude={"workers"})
            for name, digest in run.content().items():
                seen.setdefault((name, data), set()).add(digest)
        return sorted({name for (name, _), digests in seen.items() if len(digests) > 1})

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines; mAP and AP as fractions."""
        return {
            "split": self.split,
            "baseline": self.baseline.label,
            "groups": [self._group_json(group) for group in self.groups],
            "equal_time": [row.as_dict() for row in at_equal_time(self)],
            "differences": self.differences(),
            "cautions": self.cautions(),
        }

    def _group_json(self, group: RunGroup) -> dict[str, Any]:
        gain = self.gain(group)
        return {
            "label": group.label,
            "title": group.title,
            "name": group.name,
            "seeds": list(group.seeds),
            "folders": [str(run.folder) for run in group.runs],
            "metrics": _as_dicts({name: group.metric(name) for name in METRICS}),
            "costs": _as_dicts({name: group.cost(name) for name in COSTS}),
            "classes": _as_dicts(group.classes()),
            "curves": [
                {
                    "seed": run.seed,
                    "steps": [step for step, _ in run.curve],
                    "val/mAP": [value for _, value in run.curve],
                }
                for run in group.runs
            ],
            "gain": None if gain is None else gain.as_dict(),
        }


_HARMLESS = ("data.workers",)


def compare(runs: Sequence[str | Path], output_root: Path) -> Comparison:
    """Read runs and put them side by side; those that differ in their seed only are one group.

    Args:
        runs: run folders, names or beginnings of names of folders in ``output_root``, or run
            names or ids of MLflow; at least one.
        output_root: the folder that holds runs.

    Raises:
        UserError: a run is missing or has not finished.
    """
    found = _with_teachers([read_run(folder) for folder in find_folders(runs, output_root)])
    if not found:
        raise UserError("nothing to compare: name at least one run folder")
    tested = all(run.number("test/mAP") is not None for run in found)
    prefix = "test/" if tested else ""
    by_recipe: dict[str, list[FinishedRun]] = {}
    for run in found:
        by_recipe.setdefault(run.recipe(), []).append(run)
    members = [tuple(sorted(runs, key=lambda run: run.seed)) for runs in by_recipe.values()]
    labels = distinct_labels(
        [recipe_name(runs[0].config) for runs in members],
        [runs[0].settings() for runs in members],
        [runs[0].folder.name for runs in members],
    )
    groups = tuple(
        RunGroup(runs, prefix, label) for runs, label in zip(members, labels, strict=True)
    )
    return Comparison(groups, _baseline(groups), "test" if tested else "validation")


def _with_teachers(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The same; a run whose weights another one distils is a teacher, whatever its recipe."""
    teachers = {
        Path(weights).resolve()
        for run in runs
        if run.config.teacher is not None
        and isinstance(weights := run.config.teacher.weights, Path)
    }
    return [
        replace(run, config=_as_teacher(run.config))
        if (run.folder / WEIGHTS_FILE).resolve() in teachers
        else run
        for run in runs
    ]


def _as_teacher(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"role": "teacher"})})


def _baseline(groups: Sequence[RunGroup]) -> RunGroup:
    """The first plain student; of several variants the one that is named without an addition."""
    plain = [group for group in groups if group.title == "plain student"]
    usual = [group for group in plain if group.label == recipe_name(group.runs[0].config)]
    return [*usual, *plain, *groups][0]


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def _difference(one: FinishedRun, two: FinishedRun, key: str) -> float | None:
    ours, theirs = one.number(key), two.number(key)
    return None if ours is None or theirs is None else ours - theirs


def _as_dicts(spreads: dict[str, Any]) -> dict[str, Any]:
    return {name: spread.as_dict() for name, spread in spreads.items() if spread is not None}
