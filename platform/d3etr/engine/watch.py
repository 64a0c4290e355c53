"""Says in the journal when a run cannot learn, at evaluations and at the end."""

from __future__ import annotations

from d3etr.engine.build import Run
from d3etr.engine.journal import JournalReader, Record
from d3etr.engine.learning import History, findings
from d3etr.engine.suspects import Facts, facts_of

FINDING = "finding"
"""Field of a message that is a finding: its kind."""


class LearningWatch:
    """Looks at the journal of a run; does nothing at any worker but the first.

    What a resumed run said before stands in its journal, and is not said again until the end.

    Args:
        run: whose journal it is.
        steps: of the whole run.
    """

    def __init__(self, run: Run, steps: int) -> None:
        self._run = run
        self._reader = JournalReader(run.journal.path)
        self._records: list[Record] = []
        self._facts: Facts | None = None
        if run.context.rank == 0:
            self._facts = facts_of(run.config, run.splits.train, steps)

    def look(self, *, ended: bool = False) -> None:
        """Write a warning for each finding that is new, at the end for each that holds."""
        run = self._run
        if self._facts is None:
            return
        self._records += self._reader.new_records()
        history = History.of(self._records)
        known = {record[FINDING] for record in self._records if FINDING in record}
        for found in findings(history, run.config, self._facts, run.step, ended=ended):
            if ended or found.kind not in known:
                run.warn(found.text, **{FINDING: found.kind})
