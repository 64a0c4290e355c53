"""Runs side by side: what they reached, what it cost, how they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from d3etr.engine.run_folder import WEIGHTS_FILE
from d3etr.errors import UserError
from d3etr.tracking.compare.differences import differences
from d3etr.tracking.compare.groups import EqualTime, RunGroup, Spread, strongest_plain
from d3etr.tracking.compare.latency import Latencies, read_latencies
from d3etr.tracking.compare.runs import FinishedRun, find_folders, read_run
from d3etr.tracking.description import recipe_name

METRICS = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
CLOCKS: Mapping[str, str] = {
    "training_device_seconds": "GPU time of training steps",
    "training_cpu_seconds": "CPU time of training steps",
    "training_seconds": "wall time of training steps",
}
"""Where a summary has what training cost, the most reliable first: wall time is no measure on a
machine that others use too."""
COSTS = ("parameters", *CLOCKS, "steps")
LONGEST_VALUE = 24


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side.

    Attributes:
        groups: in the order asked for.
        baseline: what gains are measured against: the plain student, else the first group.
        split: "test" where every run was measured on it, else "validation".
        latencies: of networks, from one benchmark; None where none was given.
        repeated: folders of runs that are left out: others have their recipe and seed.
    """

    groups: tuple[RunGroup, ...]
    baseline: RunGroup
    split: str
    latencies: Latencies | None = None
    repeated: tuple[Path, ...] = ()

    @property
    def students(self) -> list[RunGroup]:
        """The groups that are no teachers."""
        return [group for group in self.groups if group.title != "teacher"]

    def gain(self, group: RunGroup) -> Spread | None:
        """Gain in mAP over the baseline; None for itself and for teachers."""
        if group is self.baseline or group.title == "teacher":
            return None
        return group.gain_over(self.baseline)

    def latency(self, group: RunGroup) -> float | None:
        """Milliseconds of a batch of the group's network, None where nobody measured them."""
        return None if self.latencies is None else self.latencies.of(group.runs[0])

    def clock(self) -> str | None:
        """The first of ``CLOCKS`` that every student's summaries have, above 0."""
        for name in CLOCKS:
            costs = [group.cost(name) for group in self.students]
            if all(cost is not None and cost.mean > 0 for cost in costs):
                return name
        return None

    def equal_time(self) -> list[EqualTime]:
        """One row for each distilled student that some plain student can be held against."""
        clock, found = self.clock(), list[EqualTime]()
        for group in filter(_distils, self.students if clock is not None else ()):
            plain = [each for each in self.students if not _distils(each)]
            row = strongest_plain(group, plain, str(clock))
            found += [] if row is None else [row]
        return found

    def differences(self) -> dict[str, list[str]]:
        """Settings that are not the same everywhere: dotted key -> value of each group."""
        return differences([group.runs[0] for group in self.groups])

    def classes(self) -> dict[str, list[Spread | None]]:
        """Class name -> average precision of each group."""
        found = [group.classes() for group in self.groups]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: [each.get(name) for each in found] for name in names}

    def cautions(self) -> list[str]:
        """Why the numbers may not be comparable, one sentence each."""
        found = []
        if self.repeated:
            names = ", ".join(folder.name for folder in self.repeated)
            found.append(f"Left out, as another run has the same recipe and seed: {names}.")
        if any(key.startswith("data.") for key in self.differences()):
            found.append("The runs differ in their data or its preparation: see the differences.")
        found += [
            f"The runs did not have the same {content.removeprefix('the ')}, whatever its place is "
            "called: it was changed between them."
            for content in self._changed_contents()
        ]
        if len({group.runs[0].summary.get("steps") for group in self.students}) > 1:
            found.append("The students were not trained for the same number of steps.")
        if len({group.seeds for group in self.students}) > 1:
            found.append("The groups do not have the same seeds: gains are differences of means.")
        unmeasured = [group.label for group in self.groups if self.latency(group) is None]
        if self.latencies is not None and unmeasured:
            found.append(f"The benchmark has no such network: {', '.join(unmeasured)}.")
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
            "latency": None if self.latencies is None else self.latencies.as_json(),
            "groups": [self._group_json(group) for group in self.groups],
            "equal_time": [
                {
                    "group": row.group.label,
                    "rival": row.rival.label,
                    "seconds": list(row.seconds),
                    "mAP": list(row.mAP),
                    "gain": row.mAP[0] - row.mAP[1],
                    "estimated": row.estimated,
                }
                for row in self.equal_time()
            ],
            "differences": self.differences(),
            "cautions": self.cautions(),
        }

    def _group_json(self, group: RunGroup) -> dict[str, Any]:
        gain = self.gain(group)
        return {
            "label": group.label,
            "title": group.title,
            "name": group.runs[0].config.run.name,
            "seeds": list(group.seeds),
            "folders": [str(run.folder) for run in group.runs],
            "metrics": _as_dicts({name: group.metric(name) for name in METRICS}),
            "costs": _as_dicts({name: group.cost(name) for name in COSTS}),
            "latency_ms": self.latency(group),
            "classes": _as_dicts(group.classes()),
            "curves": [
                {
                    "seed": run.config.run.seed,
                    "steps": list(run.curve),
                    "val/mAP": list(run.curve.values()),
                }
                for run in group.runs
            ],
            "gain": None if gain is None else asdict(gain),
        }


def compare(
    runs: Sequence[str | Path], output_root: Path, latency: Path | None = None
) -> Comparison:
    """Read runs and put them side by side; those that differ in their seed only are one group.

    Of several with the same seed, too, the first counts: another would be no further evidence.

    Args:
        runs: run folders, names or beginnings of names of folders in ``output_root``; at least
            one.
        output_root: the folder that holds runs.
        latency: what ``d3etr benchmark --json`` printed.

    Raises:
        UserError: a run is missing or has not finished, or none is of a network whose latency was
            measured.
    """
    folders = dict.fromkeys(folder for run in runs for folder in find_folders(run, output_root))
    found = _with_teachers([read_run(folder) for folder in folders])
    if not found:
        raise UserError("nothing to compare: name at least one run folder")
    latencies = None if latency is None else read_latencies(latency, found)
    tested = all(run.number("test/mAP") is not None for run in found)
    by_recipe: dict[str, dict[int, FinishedRun]] = {}
    for run in found:
        by_recipe.setdefault(run.recipe(), {}).setdefault(run.config.run.seed, run)
    members = [[each[seed] for seed in sorted(each)] for each in by_recipe.values()]
    kept = {run.folder for each in members for run in each}
    repeated = tuple(run.folder for run in found if run.folder not in kept)
    names = [recipe_name(each[0].config) for each in members]
    labels = distinct_labels(
        names,
        [each[0].settings() for each in members],
        [each[0].folder.name for each in members],
    )
    groups = tuple(
        RunGroup(tuple(each), "test/" if tested else "", label)
        for each, label in zip(members, labels, strict=True)
    )
    # Of several variants of a plain student the one that is named without an addition.
    plain = [group for group in groups if group.title == "plain student"]
    usual = [group for group in plain if group.label in names]
    baseline, split = [*usual, *plain, *groups][0], "test" if tested else "validation"
    return Comparison(groups, baseline, split, latencies, repeated)


def distinct_labels(
    names: Sequence[str], settings: Sequence[Mapping[str, str]], folders: Sequence[str]
) -> list[str]:
    """The names; where several are equal, with a setting in which they differ from most of those.

    Args:
        names: of the recipes.
        settings: dotted key -> value of each.
        folders: of a run of each, all different.

    Returns:
        ``plain student``, ``plain student, steps=1500``.
    """
    labels = []
    for name, own in zip(names, settings, strict=True):
        alike = [each for other, each in zip(names, settings, strict=True) if other == name]
        keys = dict.fromkeys(key for each in alike for key in each)
        # When something is measured says least about a recipe.
        for key in sorted(keys, key=lambda key: key.startswith("evaluation.")):
            # The first of equally frequent values counts as the usual one.
            usual = Counter(each.get(key, "-") for each in alike).most_common(1)[0][0]
            value = own.get(key, "-")
            if value != usual:
                name += f", {key.rpartition('.')[2]}={shortened(value, LONGEST_VALUE)}"
                break
        labels.append(name)
    return [
        label if labels.count(label) == 1 else f"{label} ({folder})"
        for label, folder in zip(labels, folders, strict=True)
    ]


def shortened(value: str, longest: int) -> str:
    """A value, its beginning cut off where it is long: the end of a path says more."""
    return value if len(value) <= longest else f"...{value[-(longest - 3) :]}"


def _with_teachers(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The same; a run whose weights another one distils is a teacher, whatever its recipe."""
    distilled = [run.config.teacher.weights for run in runs if run.config.teacher is not None]
    teachers = {weights.resolve() for weights in distilled if isinstance(weights, Path)}
    found = []
    for run in runs:
        if (run.folder / WEIGHTS_FILE).resolve() in teachers:
            section = run.config.run.model_copy(update={"role": "teacher"})
            run = replace(run, config=run.config.model_copy(update={"run": section}))
        found.append(run)
    return found


def _distils(group: RunGroup) -> bool:
    return group.runs[0].config.distillation.method != "none"


def _as_dicts(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
    return {name: asdict(spread) for name, spread in spreads.items() if spread is not None}
