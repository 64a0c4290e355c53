"""How much the adaptive correspondence still moves between evaluations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import DetectionSplit
from d3etr.data.transforms import collate
from d3etr.distiller import Distiller
from d3etr.evaluation.evaluator import Workers
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

WATCHED_IMAGES = 32


class MatchingStability:
    """Share of adaptive pairs (teacher query to student query) that are as they were.

    Watches a fixed set of validation images during evaluations: the student's outputs come
    from there, only the teacher runs once more. Pairs are compared at rank 0, so the number
    of workers may change between evaluations.

    Args:
        distiller: the teacher and how it is matched.
        split: the validation images; evenly spaced ones are watched.
        workers: those that share the images.
        teachers: the images as the teacher sees them, where that is not as the student does.
    """

    def __init__(
        self,
        distiller: Distiller,
        split: DetectionSplit,
        workers: Workers,
        teachers: DetectionDataset | None = None,
    ) -> None:
        self._distiller, self._workers, self._teachers = distiller, workers, teachers
        stride = max(1, len(split.records) // WATCHED_IMAGES)
        places = range(0, len(split.records), stride)[:WATCHED_IMAGES]
        self._watched = {split.records[place].id: place for place in places}
        self._found: list[Tensor] = []
        self.state: Tensor | None = None
        """[images, 1 + L * M]: image id, then each teacher query's student query or -1."""

    @torch.no_grad()
    def observe(self, images: ImageBatch, targets: Targets, student: DecoderOutputs) -> None:
        """Match the watched images of one evaluation batch."""
        chosen = [i for i, identity in enumerate(targets.image_ids) if identity in self._watched]
        if not chosen:
            return
        shown = self._shown(images, targets, chosen)
        teacher = self._distiller.run_teacher(shown, targets=targets.of_images(chosen))
        assert teacher is not None
        student = replace(
            student,
            logits=student.logits[:, chosen],
            boxes_cxcywh=student.boxes_cxcywh[:, chosen],
            self_maps=None,  # matching needs none
            cross_maps=None,
        )
        pairs = _pairs(self._distiller, student, teacher.main)
        ids = torch.tensor([[targets.image_ids[i]] for i in chosen], device=pairs.device)
        self._found.append(torch.cat([ids, pairs.transpose(0, 1).flatten(1)], 1))

    def _shown(self, images: ImageBatch, targets: Targets, chosen: list[int]) -> ImageBatch:
        """What the teacher sees of some images of a batch."""
        if self._teachers is None:
            padding = None if images.padding is None else images.padding[chosen]
            return ImageBatch(images.pixels[chosen], padding)
        samples = [self._teachers[self._watched[targets.image_ids[i]]] for i in chosen]
        return collate(samples, self._teachers.preprocessing)[0].to(images.pixels.device)

    def compare(self) -> float | None:
        """Share of pairs that did not change since the last call, in [0, 1].

        All workers call it after an evaluation.

        Returns:
            The share over layers and images at rank 0; None at the first call and elsewhere.
        """
        teacher, layers = self._distiller.teacher, self._distiller.student.config.decoder_layers
        assert teacher is not None
        width = 1 + layers * teacher.config.queries
        nothing = torch.zeros(0, width, dtype=torch.int64, device=self._workers.device)
        gathered = self._workers.gather(torch.cat([nothing, *self._found]))
        self._found.clear()
        if gathered is None:
            return None
        now = torch.cat([part.cpu() for part in gathered])
        now = now[now[:, 0].argsort()]
        before, self.state = self.state, now
        return None if before is None or before.shape != now.shape else unchanged(before, now)


def unchanged(before: Tensor, now: Tensor) -> float:
    """Share of the pairs in ``now`` that are also in ``before``; 1 if there are none.

    Args:
        before: [images, 1 + K]: image id, then student queries, -1 for unmatched.
        now: the same for the same images.
    """
    paired = now[:, 1:] >= 0
    same = (now[:, 1:] == before[:, 1:]) & paired
    return float(same.sum() / paired.sum()) if bool(paired.any()) else 1.0


def _pairs(distiller: Distiller, student: DecoderOutputs, teacher: DecoderOutputs) -> Tensor:
    """[L, B, M] student query of each teacher query, -1 for unmatched ones."""
    matching = distiller.method.adaptive
    assert matching is not None and distiller.teacher is not None
    problem = matching.problem(student, teacher)
    (assignment,) = distiller.solver.start_named({"adaptive": problem})().values()
    assignment.ensure_finite(problem.name)
    pairs = matching.correspondence(assignment, student, teacher)
    columns = assignment.columns if pairs.teacher is None else pairs.teacher
    rows = assignment.rows if pairs.student is None else pairs.student
    layers, images = columns.shape[:2]
    # As many as it could have: a two-stage teacher has no more queries than tokens.
    most = distiller.teacher.config.queries
    table = torch.full((layers, images, most), -1, device=columns.device)
    return table.scatter_(2, columns, rows)
