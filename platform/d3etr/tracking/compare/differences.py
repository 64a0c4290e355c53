"""What is not the same in the recipes of runs."""

from __future__ import annotations

from collections.abc import Sequence

from d3etr.tracking.compare.runs import FinishedRun


def differences(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Settings that are not the same everywhere: dotted key -> value of each run.

    Of a section that some runs do not have, such as the teacher's, only what others chose.
    """
    settings = [run.settings() for run in runs]
    longest_first = sorted(settings, key=len, reverse=True)
    keys = dict.fromkeys(key for each in longest_first for key in each)
    sections = {key.rpartition(".")[0] for key in keys}
    rows = {key: [each.get(key, "-") for each in settings] for key in keys}
    chosen = set[str]().union(*(run.chosen() for run in runs))
    # A section that is null in one run only repeats its keys in the others.
    return {
        key: values
        for key, values in rows.items()
        if len(set(values)) > 1
        and key not in sections
        and (key in chosen or all(key in each for each in settings))
    }
