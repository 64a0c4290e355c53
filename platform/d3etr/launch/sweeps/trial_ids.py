"""Numbers for Ray Tune's trials: with a searcher their ids are random.

A trial's folder in Tune's storage is named after its number, which the driver, the trial itself
and a resumed sweep can all read.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from ray.tune.experiment import Trial


def make_trial_folder(place: Path, trial: Trial) -> str:
    """Give a new trial the next free number by making its folder; returns the folder's name.

    A resumed sweep has a new driver that knows nothing but what is on disk.

    Args:
        place: Tune's folder of the sweep.
        trial: of Tune.
    """
    for number in count():
        try:
            (place / f"{number:05d}").mkdir(parents=True)
        except FileExistsError:
            continue
        return f"{number:05d}"
    raise AssertionError


def number_in(trial_folder: str | Path) -> int:
    """The number of the trial whose folder in Tune's storage this is."""
    return int(Path(trial_folder).name)


def number_of(trial: Trial) -> int:
    """The number of a trial that was made before, also by a driver that is dead."""
    assert trial.custom_dirname is not None
    return number_in(trial.custom_dirname)
