"""What query groups learn from ground truth: who is matched with what, and the set criterion.

Where boxes are refined as distributions over their edges (D-FINE, arXiv 2410.13842), what the first
layer says before refinement (``pre_outputs`` of the official code) learns as one more layer, which
has a matching of its own, and the edges learn by the losses of ``losses/box_distributions.py``.
With ``union_matching``, boxes of the main group and of the proposals and edges of the main group
learn over the union of the matches of both.

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
from d3etr.losses.box_distributions import QueryCounts
from d3etr.losses.copies import blocks_as_layers
from d3etr.losses.edge_supervision import (
    edge_losses,
    for_layers,
    query_counts,
    with_first_outputs,
)
from d3etr.losses.set_criterion import detection_problem, query_weights, set_losses
from d3etr.matching.assignment import Assignment, Solutions, Solver
from d3etr.matching.union import SharedPairs, given_assignment, shared_pairs
from d3etr.structures import MAIN, DecoderOutputs, QueryGroup, Supervision, Targets

PROPOSALS = "proposals"
"""Name of the losses of what a two-stage encoder proposes."""
_CLASS_WEIGHTS = "class_weights/"
"""Normalisers of the cross entropy of a student with softmax classes, by group."""

Normalisers = dict[str, Tensor]


@dataclass(frozen=True)
class _Learner:
    """Outputs that learn from ground truth.

    Attributes:
        outputs: of a group or of the encoder.
        layers: the same with what the first layer says before refinement, where it says something.
        targets: their ground truth.
        copies: queries that learn each object.
    """

    outputs: DecoderOutputs
    layers: DecoderOutputs
    targets: Targets
    copies: int = 1

    @classmethod
    def of(cls, outputs: DecoderOutputs, targets: Targets, copies: int = 1) -> _Learner:
        """Of outputs for the same images."""
        return cls(outputs, with_first_outputs(outputs), targets, copies)


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
        learners = self._learners(decoded, groups, proposals, targets)
        problems = {}
        for name, learner in learners.items():
            if name != PROPOSALS and groups[name].supervision is not Supervision.HUNGARIAN:
                continue
            whose = {MAIN: "student queries"}.get(name, name)
            problems[name] = detection_problem(
                f"{whose} against objects", learner.layers, learner.targets, self.criterion
            )
        of_student = self.solver.start_named(problems)
        given = {
            name: given_assignment(
                group.objects[: targets.labelled], learners[name].layers.layers, group.pairs
            )
            for name, group in groups.items()
            if group.supervision is Supervision.GIVEN and group.objects is not None
        }

        @cache
        def losses() -> dict[str, Tensor]:
            assignments = of_teacher() | given | of_student()
            return self._losses(learners, assignments, normalisers)

        return losses

    def _learners(
        self,
        decoded: Mapping[str, DecoderOutputs],
        groups: Mapping[str, QueryGroup],
        proposals: DecoderOutputs | None,
        targets: Targets,
    ) -> dict[str, _Learner]:
        """All that learn, for the images that have labels."""
        known, targets = targets.labelled, targets.of_labelled()
        learners = {}
        for name, group in groups.items():
            outputs = decoded[name].of_first(known)
            if group.supervision is Supervision.HUNGARIAN and group.queries.blocks:
                outputs = blocks_as_layers(outputs, group.queries.blocks)
            if group.supervision is not Supervision.NONE:
                learners[name] = _Learner.of(outputs, targets, group.copies)
        if proposals is not None:
            if not self.proposals_tell_classes:  # only objects from background, as class 0
                targets = replace(targets, labels=torch.zeros_like(targets.labels))
            # One for each group that the encoder selects for: each object is learned as often.
            copies = proposals.layers
            learners[PROPOSALS] = _Learner.of(proposals.of_first(known), targets, copies)
        return learners

    def _losses(
        self,
        learners: Mapping[str, _Learner],
        assignments: Mapping[str, Assignment],
        normalisers: Normalisers,
    ) -> dict[str, Tensor]:
        """Weighted losses of all that learn."""
        shared = self._shared_pairs(learners, assignments)
        main: QueryCounts | None = None
        losses: dict[str, Tensor] = {}
        for name, part in learners.items():
            sums, pairs = normalisers, shared.get(name)
            if part.copies > 1:
                sums = sums | {"objects": sums["objects"] * part.copies}
            assignment = for_layers(assignments[name], part.layers.layers)
            losses |= self._set_losses(name, part, assignment, sums, pairs)
            if part.outputs.distributions is None:
                continue
            assignment = for_layers(assignment, part.outputs.layers)
            counts = query_counts(name, part.outputs.queries, assignment, pairs, sums, main)
            main = counts if name == MAIN else main
            terms = edge_losses(
                part.outputs,
                part.targets,
                assignment,
                pairs,
                counts,
                sums["objects"],
                self.criterion,
            )
            losses |= {f"{name}/{term}": loss for term, loss in terms.items()}
        return losses

    def _shared_pairs(
        self, learners: Mapping[str, _Learner], assignments: Mapping[str, Assignment]
    ) -> dict[str, SharedPairs]:
        """Pairs of the union of matches, by the names of those that learn over it."""
        main = learners.get(MAIN)
        if not self.criterion.union_matching or main is None:
            return {}
        names = [name for name in (MAIN, PROPOSALS) if name in learners]
        objects = main.targets
        union = shared_pairs(
            [assignments[name] for name in names],
            objects.num_objects,
            main.outputs.queries,
            objects.labels.shape[1],
        )
        return dict.fromkeys(names, union)

    def _set_losses(
        self,
        name: str,
        learner: _Learner,
        assignment: Assignment,
        normalisers: Normalisers,
        shared: SharedPairs | None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one group on ground truth."""
        config = self.criterion
        weights = {"class": config.class_weight, "l1": config.l1_weight, "giou": config.giou_weight}
        terms = set_losses(
            learner.layers,
            learner.targets,
            assignment,
            normalisers["objects"],
            config,
            normalisers.get(f"{_CLASS_WEIGHTS}{name}"),
            shared,
        )
        losses = {f"{name}/{term}": weights[term] * loss for term, loss in terms.items()}
        return assignment.nan_if_invalid(losses)
