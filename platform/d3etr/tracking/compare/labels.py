"""What to call recipes side by side, so that no two of them are called the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

LONGEST_VALUE = 24
MOST_KEYS = 1
"""So many settings are named in a label."""
LAST_RESORT = ("evaluation.",)
"""Settings of when something is measured: named only where nothing else differs."""


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
    labels = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        alike = [place for place, other in enumerate(names) if other == name]
        unusual = _unusual([settings[place] for place in alike])
        for place, keys in zip(alike, unusual, strict=True):
            labels[place] = ", ".join([name, *_named(keys)])
    return [
        label if labels.count(label) == 1 else f"{label} ({folder})"
        for label, folder in zip(labels, folders, strict=True)
    ]


def _unusual(settings: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each: the settings whose values are not those of most."""
    keys = dict.fromkeys(key for each in settings for key in each)
    # The first of equally frequent values counts as the usual one.
    usual = {
        key: Counter(each.get(key, "-") for each in settings).most_common(1)[0][0] for key in keys
    }
    found = [
        {key: each.get(key, "-") for key in keys if each.get(key, "-") != usual[key]}
        for each in settings
    ]
    without_last_resort = [
        {key: each[key] for key in each if not key.startswith(LAST_RESORT)} for each in found
    ]
    clear = len({tuple(each.items()) for each in without_last_resort}) == len(found)
    return without_last_resort if clear else found


def _named(values: Mapping[str, str]) -> list[str]:
    named = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in values.items()]
    return named if len(named) <= MOST_KEYS else [*named[:MOST_KEYS], "\N{HORIZONTAL ELLIPSIS}"]


def _short(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else "..." + value[-(LONGEST_VALUE - 3) :]
