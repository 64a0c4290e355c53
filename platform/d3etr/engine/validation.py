"""The student's examinations: evaluate, record, keep the weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from d3etr.config.tree import Config
from d3etr.detectors.weights import WeightsInfo, load_weights, save_weights
from d3etr.engine.build import Models, Splits
from d3etr.engine.distributed import TrainContext
from d3etr.engine.hooks import Hooks
from d3etr.engine.journal import Journal
from d3etr.engine.run_folder import RunFolder
from d3etr.evaluation.evaluator import Evaluation, Evaluator
from d3etr.evaluation.stability import MatchingStability
from d3etr.files import clear_disk_errors


class Validation:
    """Measures the student and keeps its best (or last) weights in the run's folder.

    Args:
        config: of the run.
        run_dir: where ``weights.safetensors`` goes.
        context: the workers.
        models: the student, or its average where there is one, is measured.
        splits: image sets.
        evaluator: of the validation split.
        journal: where records go.
        hooks: people's own code that is told of evaluations.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        context: TrainContext,
        models: Models,
        splits: Splits,
        evaluator: Evaluator,
        journal: Journal,
        hooks: Hooks,
    ) -> None:
        self._config, self._context, self._models = config, context, models
        self._splits, self._evaluator, self._journal = splits, evaluator, journal
        self._hooks = hooks
        self.weights = RunFolder(run_dir).weights
        self.kept: dict[str, Any] | None = None
        """Of the weights in the file: step, epoch, metrics."""
        self.teacher_mAP: float | None = None
        """Of the teacher on the validation split, where it is known."""
        self._warned_of_lead = False
        self.stability: MatchingStability | None = None
        if config.distillation.matches_adaptively:
            self.stability = MatchingStability(models.distiller, splits.validation, context)

    def examine(self, step: int, epoch: int) -> float | None:
        """Measure the student after ``step`` steps, ``epoch`` epochs; all workers call it.

        Returns:
            mAP as a fraction, None if the validation split holds no objects.

        Raises:
            UserError: no space left for the weights.
        """
        average = self._models.average
        with nullcontext() if average is None else average.applied():
            observe = None if self.stability is None else self.stability.observe
            evaluation = self._evaluator.measure(self._models.student, observe)
            stable = None if self.stability is None else self.stability.compare()
            self._record(step, epoch, evaluation, stable)
            if self._is_to_be_kept(evaluation):
                self._keep(step, epoch, evaluation)
        if not self._warned_of_lead:
            self._warned_of_lead = self._warn_without_lead(step, evaluation.mAP)
        return evaluation.mAP

    def warn_at_the_end(self, step: int) -> None:
        """Say once more that the teacher does not lead, of the weights that were kept."""
        kept = None if self.kept is None else self.kept["metrics"].get("mAP")
        self._warn_without_lead(step, kept)

    def _warn_without_lead(self, step: int, mAP: float | None) -> bool:
        """Name both numbers where the student is as good as its teacher."""
        teacher = self.teacher_mAP
        if teacher is None or mAP is None or mAP < teacher:
            return False
        text = (
            f"the teacher does not lead: it reaches {100 * teacher:.1f} mAP on "
            f"{self._splits.validation.annotations}, the student {100 * mAP:.1f}. Such a teacher "
            "has little left to teach: use a better one, or train without it "
            "(distillation.method: none, student.initialise_from)"
        )
        self._journal.message(step, text, "warning")
        return True

    def measure_test(self) -> dict[str, float]:
        """Measure the kept weights, read from their file, on the test split.

        Returns:
            COCO's metrics at rank 0, nothing elsewhere.
        """
        assert self._splits.test is not None
        self._context.barrier()  # the first worker may still be writing the file
        detector, _ = load_weights(self.weights)
        evaluator = Evaluator(
            self._splits.test, self._config.data, self._config.evaluation, self._context
        )
        return evaluator.measure(detector.to(self._context.device)).as_dict()

    def _record(self, step: int, epoch: int, evaluation: Evaluation, stable: float | None) -> None:
        metrics = {f"val/{name}": value for name, value in evaluation.as_dict().items()}
        if stable is not None:
            metrics["matching/stability"] = stable
        metrics["epoch"] = epoch
        metrics["time/evaluation"] = evaluation.seconds
        metrics["time/inference_images_per_second"] = evaluation.images_per_second
        self._journal.write("evaluation", step, epoch=epoch, metrics=metrics)
        if self._context.rank == 0:
            self._hooks.on_evaluation(step, metrics)
        if evaluation.mAP is None:
            text = f"{self._splits.validation.annotations} holds no objects: there is no mAP"
            self._journal.message(step, f"{text}, and the last weights are kept", "warning")

    def _is_to_be_kept(self, evaluation: Evaluation) -> bool:
        if self._config.evaluation.keep == "last" or self.kept is None or evaluation.mAP is None:
            return True
        return bool(evaluation.mAP >= self.kept["metrics"].get("mAP", -1.0))

    def _keep(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        # mAP is known to all workers, the rest to the first: the comparison needs only mAP.
        known = {} if evaluation.mAP is None else {"mAP": evaluation.mAP}
        metrics = known | evaluation.as_dict()
        speed = evaluation.images_per_second
        self.kept = {"step": step, "epoch": epoch, "metrics": metrics, "images_per_second": speed}
        if self._context.rank == 0:
            with clear_disk_errors("the student's weights", self.weights.parent):
                save_weights(self.weights, self._models.student, self._info(step, metrics))

    def _info(self, step: int, metrics: dict[str, float]) -> WeightsInfo:
        split, config = self._splits.validation, self._config
        origin: dict[str, Any] = {
            "run": config.run.name,
            "seed": config.run.seed,
            "step": step,
            "method": config.distillation.method,
            "torch": str(torch.__version__),
            "digests": dict(self._models.digests),
        }
        return WeightsInfo(
            detector=config.student.detector,
            categories=tuple((c.id, c.name) for c in split.categories),
            preprocessing=config.data.preprocessing,
            evaluation={"split": split.name, "data_digest": split.digest, **metrics},
            origin=origin,
        )
