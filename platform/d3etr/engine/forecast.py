"""How long a run will take, said from its first steps and first evaluation, and what was asked."""

from __future__ import annotations

import time
from collections.abc import Callable

from d3etr.engine.journal import Journal
from d3etr.progress import duration

SKIPPED = 2
"""First steps, which also build what later ones use."""
STEPS, FEWEST = 20, 3
SECONDS = 10.0
"""Steps that are measured, or fewer where they have taken so long."""
WORTH_SECONDS = 60.0
"""A shorter run is over before anybody has read how long it takes."""
_NEAR = 0.1
"""A run that takes this share more than was asked takes what was asked."""
_IDLE = 0.3
"""Share of the time asked for that a run leaves unused before that is said."""


class Forecast:
    """Measures the first steps and the first evaluation of a run.

    Args:
        journal: takes what is said.
        steps: of the whole run.
        first: steps that were done before, by a run that goes on.
        evaluations: of the whole run.
        minutes: that the run may take (``run.minutes``); None: nobody asked.
        clock: seconds.
    """

    def __init__(
        self,
        journal: Journal,
        steps: int,
        first: int,
        evaluations: int,
        minutes: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._journal, self._minutes, self._clock = journal, minutes, clock
        self._steps, self._first, self._evaluations = steps, first, evaluations
        self._seen, self._seconds, self._begun = 0, 0.0, 0.0
        self._per_step: float | None = None
        self._per_evaluation: float | None = None

    def begin_step(self) -> None:
        """A step, with loading its images, begins."""
        self._begun = self._clock()

    def end_step(self, step: int) -> None:
        """A step has ended, ``step`` are done; speaks once enough are known."""
        if self._per_step is not None:
            return
        self._seen += 1
        if self._seen <= SKIPPED:
            return
        self._seconds += self._clock() - self._begun
        measured = self._seen - SKIPPED
        if measured < STEPS and (measured < FEWEST or self._seconds < SECONDS):
            return
        self._per_step = self._seconds / measured
        self._say(step, f"measured in {measured} of the first steps")

    def end_evaluation(self, step: int, seconds: float) -> None:
        """An evaluation took ``seconds``; speaks again where evaluations are a large part."""
        if self._per_evaluation is not None or self._per_step is None:
            return
        self._per_evaluation = seconds
        left = self._steps - self._first
        if self._evaluations * seconds > _NEAR * left * self._per_step:
            self._say(step, f"{self._evaluations} evaluations of {seconds:.1f} s counted")

    def _say(self, step: int, how: str) -> None:
        assert self._per_step is not None
        left = self._steps - self._first
        evaluations = self._evaluations * (self._per_evaluation or 0.0)
        whole = left * self._per_step + evaluations
        asked = None if self._minutes is None or self._first else 60 * self._minutes
        if whole < WORTH_SECONDS and (asked is None or whole <= (1 + _NEAR) * asked):
            return
        each = f"{left:,} steps of {self._per_step:.2g} s"
        text = f"this run takes about {duration(whole)}: {each}, {how}"
        if self._per_evaluation is None:
            text += f"; {self._evaluations} evaluations come on top"
        level = "info"
        if asked is not None:
            compared, far = self._compared(whole, evaluations, asked)
            text, level = f"{text}. {compared}", "warning" if far else "info"
        self._journal.message(step, text, level)

    def _compared(self, whole: float, evaluations: float, asked: float) -> tuple[str, bool]:
        """How far the run is from the time asked for, and whether it is too long."""
        assert self._per_step is not None
        fitting = max(1, round((asked - evaluations) / self._per_step))
        set_steps = f"--set optimisation.epochs=null --set optimisation.steps={fitting}"
        if whole > (1 + _NEAR) * asked:
            over = duration(whole - asked)
            return f"That is {over} more than run.minutes asks for: {set_steps} fits", True
        if whole < (1 - _IDLE) * asked:
            unused = duration(asked - whole)
            return f"That leaves {unused} of run.minutes: {set_steps} would use it", False
        return f"run.minutes asks for {duration(asked)}", False
