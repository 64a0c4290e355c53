"""What a verdict found, and what it says first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from d3etr.engine.run_folder import RunFolder
from d3etr.engine.step_costs import StepCosts
from d3etr.evaluation.judge import Answer, Difference, Judgement
from d3etr.evaluation.resampling import Interval
from d3etr.launch.sweeps.results import TrialResult
from d3etr.tracking.compare.comparison import CLOCKS
from d3etr.verdict.contenders import ON_LABELS
from d3etr.verdict.judging import SplitName
from d3etr.verdict.stages import Entry

UNEQUAL = 0.1
"""Times that differ by more than this share of what was meant are said."""
OPENINGS: Mapping[Answer, str] = {
    "gain": "Distilling pays",
    "loss": "Distilling does not pay",
    "open": "No gain from distilling can be told",
}


@dataclass(frozen=True)
class Ran:
    """The finished runs of a contender at one learning rate.

    Attributes:
        entry: what ran.
        trials: a run a seed.
    """

    entry: Entry
    trials: tuple[TrialResult, ...]

    @property
    def maps(self) -> tuple[float, ...]:
        """[S] on validation."""
        return tuple(trial.mAP for trial in self.trials if trial.mAP is not None)

    @property
    def validation(self) -> float:
        """The mean over seeds."""
        return fmean(self.maps)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of the runs."""
        return tuple(trial.run_dir for trial in self.trials if trial.run_dir is not None)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Files of the trained students."""
        return tuple(RunFolder(folder).weights for folder in self.folders)

    @property
    def seconds(self) -> float:
        """Of training steps, by the most reliable clock that the runs have; the mean."""
        for clock in CLOCKS:
            values = [trial.metric(clock) for trial in self.trials]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                return fmean(known)
        return 0.0

    @property
    def clock(self) -> str:
        """``GPU time`` or the like: what ``seconds`` are."""
        for clock, text in CLOCKS.items():
            if all(trial.metric(clock) is not None for trial in self.trials):
                return text.removesuffix(" of training steps")
        return "time"


@dataclass(frozen=True)
class Stage:
    """Runs of one length, judged.

    Attributes:
        split: that they were judged on.
        ran: by contender.
        judgement: of them.
    """

    split: SplitName
    ran: tuple[Ran, ...]
    judgement: Judgement

    @property
    def stopped(self) -> tuple[str, ...]:
        """Who cannot win any more; the strongest rival stays to be compared with."""
        return tuple(name for name in self.judgement.behind if name != self.judgement.rival)

    @property
    def answer(self) -> Answer:
        """What the distilled student gains over the rival."""
        return self.gain.answer

    @property
    def gain(self) -> Difference:
        """Of the distilled student."""
        best = self.judgement.best_distilled
        assert best is not None and best.gain is not None
        return best.gain

    @property
    def sentence(self) -> str:
        """The answer with its numbers, in one sentence."""
        judgement, best = self.judgement, self.judgement.best_distilled
        assert best is not None
        said = (
            f"{OPENINGS[self.answer]}: '{best.name}' reaches {_percent(best.mAP.both.mean)} mAP, "
            f"{shown(self.gain.both)} over '{judgement.rival}' in {self._minutes()} minutes "
            f"of {self.ran[0].clock} a run ({self.split} split, {len(best.maps)} seeds)"
        )
        return f"{said}{_of_teacher(judgement)}."

    def _minutes(self) -> str:
        """Of a run, what a teacher did before its first step included."""
        each = [(ran.entry.prepared + ran.seconds) / 60 for ran in self.ran]
        mean = fmean(each)
        if max(each) - min(each) <= 2 * UNEQUAL * mean:
            return f"the same {mean:.3g}"
        return f"{min(each):.3g} to {max(each):.3g}"

    def cautions(self, costs: StepCosts, *, early: bool = False) -> list[str]:
        """What limits the answer, a sentence each; ``early`` runs are judged on validation."""
        found = []
        if early:
            found.append(
                "Short runs are judged on validation, as choices are, so what was chosen looks "
                "better than it is."
            )
        elif self.split == "validation":
            found.append(
                "There is no other split: choices and judgement share validation, so what was "
                "chosen looks better than it is. data.test would settle it."
            )
        for each in self.ran:
            name = each.entry.way.name
            meant = each.entry.steps * costs.seconds[name]
            if abs(each.seconds - meant) > UNEQUAL * meant:
                found.append(
                    f"'{name}' took {each.seconds:.0f} s of {each.clock} where {meant:.0f} were "
                    "meant: what a step costs has changed since it was measured."
                )
            if name in ON_LABELS:
                found.append(
                    f"{each.entry.prepared:.3g} s of '{name}' went into the teacher's labels."
                )
            teacher = each.entry.way.config.teacher
            if teacher is not None and teacher.views is not None:
                found.append(
                    f"{each.entry.prepared:.0f} s of '{name}' are what storing the teacher's "
                    "views takes where nothing is stored yet."
                )
        return found


@dataclass(frozen=True)
class Found:
    """Everything that a verdict found.

    Attributes:
        command: what repeats it.
        folder: where results are kept.
        minutes: that each run was meant to take.
        costs: of steps.
        left_out: contender -> why it did not take part.
        rates: contender -> the factor on its learning rate that was best; empty with one rate.
        early: the judgement after short runs.
        final: after full runs; None where the early one settled it.
        failed: whose runs did not all finish, a sentence each.
    """

    command: str
    folder: Path
    minutes: float
    costs: StepCosts
    left_out: Mapping[str, str]
    rates: Mapping[str, float] = field(default_factory=dict)
    early: Stage | None = None
    final: Stage | None = None
    failed: tuple[str, ...] = ()

    @property
    def stage(self) -> Stage:
        """The judgement that counts."""
        stage = self.final or self.early
        assert stage is not None
        return stage

    @property
    def sentence(self) -> str:
        """The answer."""
        if self.final is None:
            return f"Settled early, the full runs were left out. {self.stage.sentence}"
        return self.stage.sentence

    @property
    def cautions(self) -> list[str]:
        """What limits the answer."""
        return self.stage.cautions(self.costs, early=self.final is None)


def shown(gain: Interval) -> str:
    """``+4.0 (95 % interval +2.1 to +5.9)``, in points of mAP."""
    low, high = 100 * gain.low, 100 * gain.high
    return f"{100 * gain.mean:+.1f} (95 % interval {low:+.1f} to {high:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _of_teacher(judgement: Judgement) -> str:
    """Whether the teacher leads, as the end of a sentence."""
    lead, rival = judgement.lead, judgement.rival
    if lead is None or judgement.teacher is None:
        return ""
    reached = f"({_percent(judgement.teacher)} mAP)"
    if lead.answer == "gain":
        return f"; the teacher {reached} leads '{rival}' by {100 * lead.both.mean:.1f}"
    theirs = _percent(judgement.teacher - lead.both.mean)
    more = "" if lead.answer == "loss" else ", as far as these images and seeds can tell"
    return f"; the teacher {reached} does not lead '{rival}' ({theirs}){more}"
