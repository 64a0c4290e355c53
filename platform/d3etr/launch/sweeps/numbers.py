"""Numbers for Ray Tune's trials: with a searcher their ids are random.

A trial's folder in Tune's storage is named after its number, which the driver, the trial itself
and a resumed sweep can all read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ray.tune.experiment import Trial


@dataclass(frozen=True)
class Numbers:
    """Gives each new trial the next free number.

    Attributes:
        place: Tune's folder of the sweep.
    """

    place: Path

    def __call__(self, trial: Trial) -> str:
        """Make the trial's folder, which takes its number; returns the folder's name.

        A resumed sweep has a new driver that knows nothing but what is on disk.
        """
        number = 0
        while True:
            try:
                (self.place / f"{number:05d}").mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return f"{number:05d}"


def number_of(trial: Trial) -> int:
    """The number of a trial that was made before, also by a driver that is dead."""
    assert trial.custom_dirname is not None
    return int(trial.custom_dirname)
