"""Measurements of the student in training: evaluate, record, keep the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.weights import THRESHOLD, WeightsInfo, load_weights, save_weights
from d3etr.engine.build import Run
from d3etr.engine.hooks import Hooks
from d3etr.engine.journal import KEPT_MAP
from d3etr.engine.teacher import qualify_teacher
from d3etr.engine.watch import LearningWatch
from d3etr.evaluation.evaluator import Evaluation, Evaluator
from d3etr.evaluation.stability import MatchingStability
from d3etr.files import clear_disk_errors


class Validation:
    """Measures the student and keeps its best (or last) weights in the run's folder.

    Args:
        run: the student, or its average where there is one, is measured.
        hooks: called after every measurement.
        steps: of the whole run.
    """

    def __init__(self, run: Run, hooks: Hooks, steps: int) -> None:
        self._run, self._hooks, self._steps = run, hooks, steps
        self._watch = LearningWatch(run, steps)
        self._evaluator = self._of(run.splits.validation)
        self.kept: dict[str, Any] | None = None
        """Of the weights in the file: step, epoch, metrics."""
        self.teacher_mAP: float | None = None
        """Of the teacher on the validation split, where it is known."""
        self._warned_of_lead = False
        self.stability: MatchingStability | None = None
        if run.config.distillation.matches_adaptively:
            self.stability = self._watch_matching()

    def _watch_matching(self) -> MatchingStability:
        run, split = self._run, self._run.splits.validation
        preprocessing, scale = run.config.data.preprocessing, run.config.teacher_scale
        theirs = None
        if scale != 1:
            theirs = DetectionDataset(split, preprocessing, cache_bytes=0, image_scale=scale)
        return MatchingStability(run.models.distiller, split, run.context, theirs)

    def _of(self, split: DetectionSplit, image_scale: float = 1.0) -> Evaluator:
        config = self._run.config
        return Evaluator(split, config.data, config.evaluation, self._run.context, image_scale)

    def measure_teacher(self) -> None:
        """Make sure that the teacher, if there is one, is good enough, and record its mAP.

        Raises:
            UserError: it is below ``teacher.minimum_mAP``.
        """
        models, config = self._run.models, self._run.config
        if models.teacher is None or models.teacher_info is None or config.teacher is None:
            return
        evaluator, scale = self._evaluator, config.teacher_scale
        if scale != 1:
            evaluator = self._of(self._run.splits.validation, scale)
        self.teacher_mAP, how = qualify_teacher(
            models.teacher, models.teacher_info, config.teacher, config.data, evaluator
        )
        if self.teacher_mAP is not None:
            metrics = {"teacher/mAP": self.teacher_mAP}
            self._run.journal.write("teacher", 0, how=how, metrics=metrics)

    def measure(self, epoch: int) -> float | None:
        """Measure the student after ``epoch`` epochs; all workers call it.

        Returns:
            mAP as a fraction, None if the validation split holds no objects.

        Raises:
            UserError: no space left for the weights.
        """
        average, stability = self._run.models.average, self.stability
        with nullcontext() if average is None else average.applied():
            observe = None if stability is None else stability.observe
            evaluation = self._evaluator.measure(self._run.models.student, observe)
            keeps = self._is_to_be_kept(evaluation)
            kept = evaluation.mAP if keeps or self.kept is None else self.kept["metrics"].get("mAP")
            stable = None if stability is None else stability.compare()
            more = {"matching/stability": stable, KEPT_MAP: kept}
            self._record(epoch, evaluation, more)
            if keeps:
                self._keep(epoch, evaluation)
        if not self._warned_of_lead:
            self._warned_of_lead = self._warn_without_lead(evaluation.mAP)
        if self._run.step < self._steps:
            self._watch.look()
        return evaluation.mAP

    def measure_test(self) -> dict[str, float]:
        """Measure the kept weights, read from their file, on the test split if there is one.

        Returns:
            COCO's metrics at rank 0, nothing elsewhere.
        """
        split, context = self._run.splits.test, self._run.context
        if split is None:
            return {}
        context.barrier()  # the first worker may still be writing the file
        detector, _ = load_weights(self._run.folder.weights)
        return self._of(split).measure(detector.to(context.device)).as_dict()

    def warn_at_the_end(self) -> None:
        """Warn where the run has not learnt, and where the teacher does not lead what was kept."""
        self._watch.look(ended=True)
        self._warn_without_lead(None if self.kept is None else self.kept["metrics"].get("mAP"))

    def _warn_without_lead(self, mAP: float | None) -> bool:
        """Name both numbers where the student is as good as a teacher that it learns from."""
        teacher, method = self.teacher_mAP, self._run.models.distiller.method
        if teacher is None or mAP is None or mAP < teacher or not method.needs_teacher_outputs:
            return False
        self._run.warn(
            f"the teacher does not lead: it reaches {100 * teacher:.1f} mAP on "
            f"{self._run.splits.validation.annotations}, the student {100 * mAP:.1f}. Such a "
            "teacher has little left to teach: use a better one, or train without it "
            "(distillation.method: none, student.initialise_from)"
        )
        return True

    def _record(self, epoch: int, evaluation: Evaluation, more: Mapping[str, float | None]) -> None:
        run = self._run
        metrics = {f"val/{name}": value for name, value in evaluation.as_dict().items()}
        metrics |= {name: value for name, value in more.items() if value is not None}
        metrics["epoch"] = epoch
        metrics["time/evaluation"] = evaluation.seconds
        metrics["time/inference_images_per_second"] = evaluation.images_per_second
        run.journal.write("evaluation", run.step, epoch=epoch, metrics=metrics)
        if run.context.rank == 0:
            self._hooks.call("on_evaluation", run.step, metrics)
        if evaluation.mAP is None:
            split = run.splits.validation.annotations
            run.warn(f"{split} holds no objects: there is no mAP, and the last weights are kept")

    def _is_to_be_kept(self, evaluation: Evaluation) -> bool:
        keep = self._run.config.evaluation.keep
        if keep == "last" or self.kept is None or evaluation.mAP is None:
            return True
        return bool(evaluation.mAP >= self.kept["metrics"].get("mAP", -1.0))

    def _keep(self, epoch: int, evaluation: Evaluation) -> None:
        # mAP is known to all workers, the rest to the first: the comparison needs only mAP.
        known = {} if evaluation.mAP is None else {"mAP": evaluation.mAP}
        metrics, run = known | evaluation.as_dict(), self._run
        speed = evaluation.images_per_second
        kept = {"step": run.step, "epoch": epoch, "metrics": metrics, "images_per_second": speed}
        self.kept = kept
        if run.context.rank == 0:
            with clear_disk_errors("the student's weights", run.folder.path):
                info = self._info(metrics, evaluation.threshold)
                save_weights(run.folder.weights, run.models.student, info)

    def _info(self, metrics: dict[str, float], threshold: float | None) -> WeightsInfo:
        split, config = self._run.splits.validation, self._run.config
        origin: dict[str, Any] = {
            "run": config.run.name,
            "seed": config.run.seed,
            "step": self._run.step,
            "method": config.distillation.method,
            "torch": str(torch.__version__),
            "digests": dict(self._run.models.digests),
        }
        return WeightsInfo(
            detector=config.student.detector,
            categories=tuple((c.id, c.name) for c in split.categories),
            preprocessing=config.data.preprocessing,
            evaluation={
                "split": split.name,
                "data_digest": split.digest,
                **metrics,
                **({} if threshold is None else {THRESHOLD: threshold}),
            },
            origin=origin,
        )
