"""Whether a run learns: what its losses and measurements say, and what may be the matter.

Pure functions of the journal's records. The thresholds are our choice: they are so low that a run
which learns passes them within its first fifth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from d3etr.config.tree import Config
from d3etr.engine.journal import Record
from d3etr.engine.suspects import Facts, Suspect, suspects

NOTHING = 0.001
"""mAP below which nothing is found."""
LOW = 0.15
"""mAP below which standing still is no success."""
FEWEST_STEPS, FEWEST_AT_THE_END = 300, 50
"""Steps before which nothing can be said of a run that goes on, or has ended."""
SHARE = 0.2
"""Of a run, likewise."""
DESCENT = 0.95
"""Factor that a loss should fall below of what it was."""
_FEWEST_RECORDS = 10
_PLATEAU, _FEWEST_EVALUATIONS, _RISE = 0.4, 4, 0.005
"""Of a run's steps so far, and measurements in them, without a rise of mAP by so much."""
_HALF = 0.5

ZERO, FLAT, PLATEAU, CLASSES = "zero mAP", "no descent", "plateau", "classes not found"


@dataclass(frozen=True)
class Finding:
    """One way in which a run does not learn.

    Attributes:
        kind: ``ZERO``, ``FLAT``, ``PLATEAU`` or ``CLASSES``.
        text: for a person: what was seen, suspects, and what to set.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class History:
    """What the journal says of a run.

    Attributes:
        losses: (step, loss).
        maps: (step, mAP as a fraction).
        classes: class -> the highest AP of all measurements.
    """

    losses: Sequence[tuple[int, float]]
    maps: Sequence[tuple[int, float]]
    classes: dict[str, float]

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        """That of a journal's records."""
        losses, maps, classes = [], [], dict[str, float]()
        for record in records:
            metrics, step = record.get("metrics") or {}, int(record["step"])
            if record["kind"] == "step" and "train/loss" in metrics:
                losses.append((step, float(metrics["train/loss"])))
            if record["kind"] == "evaluation" and "val/mAP" in metrics:
                maps.append((step, float(metrics["val/mAP"])))
                prefix = "val/AP/"
                found = {
                    name.removeprefix(prefix): float(value)
                    for name, value in metrics.items()
                    if name.startswith(prefix)
                }
                # One that was found and is lost again is no class that nobody can learn.
                classes |= {name: max(found[name], classes.get(name, 0.0)) for name in found}
        return cls(losses, maps, classes)

    @property
    def best(self) -> float:
        """The highest mAP; 0 before the first measurement."""
        return max((value for _, value in self.maps), default=0.0)


def findings(
    history: History, config: Config, facts: Facts, step: int, *, ended: bool
) -> list[Finding]:
    """What speaks against a run that stands at ``step``; nothing while it is too young.

    Args:
        history: of the run.
        config: of the run.
        facts: what its data is like, and how long it is.
        step: optimiser steps done.
        ended: whether the run is over.
    """
    young = step < (FEWEST_AT_THE_END if ended else max(FEWEST_STEPS, SHARE * facts.steps))
    if young:
        return []
    seen = dict[str, str | None]()
    seen[ZERO] = _zero(history)
    seen[FLAT] = _flat(history)
    seen[PLATEAU] = None if ended or seen[ZERO] else _plateau(history, step)
    seen[CLASSES] = None if seen[ZERO] else _never_found(history, facts, step, ended)
    found = []
    for kind, text in seen.items():
        if text is not None:
            advice = _advice(suspects(kind == FLAT, config, facts)) if kind != CLASSES else ""
            at = f"after {step:,} of {facts.steps:,} steps"
            found.append(Finding(kind, f"{at} {text}{advice}"))
    return found


def _zero(history: History) -> str | None:
    if not history.maps or history.best >= NOTHING:
        return None
    return "this run has learnt to detect nothing: 0.0 mAP on validation"


def _flat(history: History) -> str | None:
    """A loss that is where it began, of a run that finds little."""
    losses = [loss for _, loss in history.losses]
    if len(losses) < _FEWEST_RECORDS or history.best >= LOW:
        return None
    first = losses[: max(2, len(losses) // 10)]
    last = losses[-max(2, len(losses) // 5) :]
    before, now = sum(first) / len(first), sum(last) / len(last)
    if now < DESCENT * before:
        return None
    return f"the loss has not fallen: it was {before:.3g} at the start and is {now:.3g}"


def _plateau(history: History, step: int) -> str | None:
    since = (1 - _PLATEAU) * step
    before = [value for at, value in history.maps if at <= since]
    later = [value for at, value in history.maps if at > since]
    if not before or len(later) < _FEWEST_EVALUATIONS or history.best >= LOW:
        return None
    if max(later) > max(before) + _RISE:
        return None
    return (
        f"mAP stands still: {100 * max(before):.1f} before step {round(since):,}, "
        f"{100 * max(later):.1f} at best in {len(later)} measurements since"
    )


def _never_found(history: History, facts: Facts, step: int, ended: bool) -> str | None:
    """Classes that are trained on and never found, once the others are."""
    if history.best < NOTHING or not (ended or step >= _HALF * facts.steps):
        return None
    lost = [
        f"{name} ({facts.classes.get(name, 0):,} objects to learn from)"
        for name, value in history.classes.items()
        if value <= 0 and facts.classes.get(name)
    ]
    if not lost or len(lost) == len(history.classes):
        return None
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    longer = f"--set optimisation.epochs=null --set optimisation.steps={2 * facts.steps}"
    return (
        f"these classes have not been found once: {', '.join(lost[:5])}{more}. Label more of them, "
        f"or train longer: {longer}"
    )


def _advice(found: Sequence[Suspect]) -> str:
    """Suspects and what to set, the likeliest first."""
    if not found:
        return ". Nothing in the recipe is suspicious: look at the labels (d3etr check-data)"
    texts = [f"{one.text}: {' '.join(f'--set {each}' for each in one.overrides)}" for one in found]
    return f". Suspects: {'; '.join(texts)}"
