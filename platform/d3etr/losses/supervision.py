"""What query groups learn from ground truth: who is matched with what, and the set criterion.

Of a batch in which some images have no labels, all of this sees the others alone: what is on the
rest is unknown, and counts neither as objects nor as background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from d3etr.config.training import SetCriterionConfig
from d3etr.losses.set_criterion import detection_problem, query_weights, set_losses
from d3etr.matching.assignment import Assignment, Solutions, Solver
from d3etr.structures import MAIN, DecoderOutputs, QueryGroup, Supervision, Targets

PROPOSALS = "proposals"
"""Name of the losses of what a two-stage encoder proposes."""
_CLASS_WEIGHTS = "class_weights/"
"""Normalisers of the cross entropy of a student with softmax classes, by group."""

Normalisers = dict[str, Tensor]


@dataclass(frozen=True)
class GroundTruthSupervision:
    """The set criterion over every query group, by the supervision that each group carries.

    Attributes:
        criterion: weights of the criterion and its matching.
        solver: of the bipartite problems.
        proposals_tell_classes: whether a two-stage encoder's proposals learn objects' classes; else
            class 0 is "some object".
    """

    criterion: SetCriterionConfig
    solver: Solver
    proposals_tell_classes: bool = False

    def start_teachers(self, groups: Mapping[str, QueryGroup], targets: Targets) -> Solutions:
        """Begin to match the teacher's queries with objects, for groups that learn by that."""
        truth, known = targets.of_labelled(), targets.labelled
        problems = {
            name: detection_problem(
                "teacher queries against objects",
                group.teacher.of_first(known),
                truth,
                self.criterion,
            )
            for name, group in groups.items()
            if group.supervision is Supervision.TEACHER and group.teacher is not None
        }
        return self.solver.start_named(problems)

    def class_normalisers(self, sizes: Mapping[str, int], targets: Targets) -> Normalisers:
        """What the cross entropy of a student with softmax classes is divided by.

        Args:
            sizes: queries of each group.
            targets: ground truth of a micro-batch.
        """
        targets = targets.of_labelled()
        return {
            f"{_CLASS_WEIGHTS}{name}": query_weights(targets, size, self.criterion)
            for name, size in sizes.items()
        }

    def begin(
        self,
        decoded: Mapping[str, DecoderOutputs],
        groups: Mapping[str, QueryGroup],
        proposals: DecoderOutputs | None,
        of_teacher: Solutions,
        targets: Targets,
        normalisers: Normalisers,
    ) -> Callable[[], dict[str, Tensor]]:
        """Begin to match what learns from ground truth; the result computes the losses once.

        Args:
            decoded: outputs of the groups.
            groups: what the student decoded, by name.
            proposals: what a two-stage encoder proposes, of all tokens or those it selected.
            of_teacher: what ``start_teachers`` returned.
            targets: ground truth.
            normalisers: sums over the global batch.
        """
        known, targets = targets.labelled, targets.of_labelled()
        outputs = {
            name: decoded[name].of_first(known)
            for name, group in groups.items()
            if group.supervision is not Supervision.NONE
        }
        own = [name for name in outputs if groups[name].supervision is Supervision.HUNGARIAN]
        truth = dict.fromkeys(outputs, targets)
        if proposals is not None:
            outputs[PROPOSALS] = proposals.of_first(known)
            own.append(PROPOSALS)
            truth[PROPOSALS] = targets
            if not self.proposals_tell_classes:  # only objects from background, as class 0
                truth[PROPOSALS] = replace(targets, labels=torch.zeros_like(targets.labels))
        problems = {}
        for name in own:
            whose = {MAIN: "student queries"}.get(name, name)
            problems[name] = detection_problem(
                f"{whose} against objects", outputs[name], truth[name], self.criterion
            )
        of_student = self.solver.start_named(problems)
        given = {
            name: _given_assignment(group.objects[:known], outputs[name].layers, group.pairs)
            for name, group in groups.items()
            if group.supervision is Supervision.GIVEN and group.objects is not None
        }

        @cache
        def losses() -> dict[str, Tensor]:
            assignments = of_teacher() | given | of_student()
            found: dict[str, Tensor] = {}
            for name, part in outputs.items():
                sums = normalisers
                if name in groups and groups[name].copies > 1:
                    sums = sums | {"objects": sums["objects"] * groups[name].copies}
                found |= self._set_losses(name, part, truth[name], assignments[name], sums)
            return found

        return losses

    def _set_losses(
        self,
        name: str,
        outputs: DecoderOutputs,
        targets: Targets,
        assignment: Assignment,
        normalisers: Normalisers,
    ) -> dict[str, Tensor]:
        """Weighted losses of one group on ground truth."""
        config = self.criterion
        weights = {"class": config.class_weight, "l1": config.l1_weight, "giou": config.giou_weight}
        classes = normalisers.get(f"{_CLASS_WEIGHTS}{name}")
        terms = set_losses(outputs, targets, assignment, normalisers["objects"], config, classes)
        losses = {f"{name}/{term}": weights[term] * loss for term, loss in terms.items()}
        return assignment.nan_if_invalid(losses)


def _given_assignment(
    objects: Tensor, layers: int, pairs: tuple[int, ...] | None = None
) -> Assignment:
    """Queries with their objects, the same in each layer.

    Args:
        objects: [B, N] index of each query's object, -1 for none.
        layers: L.
        pairs: queries of each image, or more images, that have an object; None waits for the
            device to count them.
    """
    used = objects >= 0
    # Queries with an object first, in order: the slots behind them are unused.
    rows = used.int().argsort(dim=1, descending=True, stable=True)
    slots = used.gather(1, rows)
    columns = objects.gather(1, rows).clamp(min=0)
    counts = tuple(used.sum(1).tolist()) if pairs is None else pairs[: len(objects)]
    expand = (layers, -1, -1)
    return Assignment(
        (rows * slots).expand(expand), (columns * slots).expand(expand), counts, slots
    )
