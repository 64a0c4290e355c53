"""The whole configuration of one run."""

from typing import Self

from pydantic import Field, model_validator

from d3etr.config.base import Section
from d3etr.config.data import DataConfig
from d3etr.config.detector import StudentConfig, TeacherConfig
from d3etr.config.distillation import AnyMethod, method_config
from d3etr.config.infrastructure import ClusterConfig, RunConfig, TrackingConfig
from d3etr.config.location import Location
from d3etr.config.training import EvaluationConfig, OptimisationConfig, Precision


class Config(Section):
    """One run: everything that is needed to repeat it."""

    run: RunConfig = RunConfig()
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: StudentConfig = Field(default_factory=StudentConfig)
    distillation: AnyMethod = Field(default_factory=method_config)
    optimisation: OptimisationConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def micro_batches(self, workers: int) -> int:
        """Micro-batches per optimiser step over all workers.

        Fewer workers than configured share the same micro-batches: memory per worker, random
        numbers and losses stay what they are.

        Args:
            workers: that are there.
        """
        return max(workers, self.cluster.workers) * self.optimisation.accumulation

    @property
    def teacher_precision(self) -> Precision:
        """What the teacher's forward passes in training run in."""
        own = None if self.teacher is None else self.teacher.precision
        return own or self.optimisation.precision

    @property
    def teacher_scale(self) -> float:
        """How large the teacher sees a picture, as a factor on the student's sides."""
        return 1.0 if self.teacher is None else self.teacher.image_scale

    @property
    def initial_weights(self) -> Location | None:
        """The file of ``student.initialise_from``; None where nothing is initialised from one."""
        start = self.student.initialise_from
        if start is None or start.weights is not None:
            return None if start is None else start.weights
        return None if self.teacher is None else self.teacher.weights

    @model_validator(mode="after")
    def _criterion_is_the_students(self) -> Self:
        """Defaults of the criterion that depend on the kind of student."""
        criterion = self.optimisation.set_criterion
        defaults = self.student.detector.criterion_defaults
        unset = {k: v for k, v in defaults.items() if k not in criterion.model_fields_set}
        if unset:
            criterion = criterion.model_copy(update=unset)
            optimisation = self.optimisation.model_copy(update={"set_criterion": criterion})
            object.__setattr__(self, "optimisation", optimisation)  # as it is being made
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if not self.distillation.needs_teacher and self.teacher is not None:
            raise ValueError(
                "teacher is set but distillation.method is 'none': nothing would use it"
            )
        if problem := _teacher_problem(self):
            raise ValueError(problem)
        if self.student.initialise_from is not None and self.initial_weights is None:
            raise ValueError(
                "student.initialise_from.weights is not set and there is no teacher whose parts "
                "could be meant: set it to a weights file"
            )
        if problem := _inheritance_problem(self):
            raise ValueError(problem)
        if self.optimisation.inherited_warmup_steps and self.student.initialise_from is None:
            raise ValueError(
                "optimisation.inherited_rate_factor has no effect: student.initialise_from is null"
            )
        self._criterion_fits()
        self._unlabelled_images_teach()
        self._views_are_of_something()
        if problem := _views_problem(self):
            raise ValueError(problem)
        student = self.student.detector
        if self.optimisation.sampling_rate_factor != 1 and not student.sampling_parts:
            raise ValueError(
                f"optimisation.sampling_rate_factor has no effect on detector '{student.name}', "
                "only on those that sample locations, such as 'deformable_detr'"
            )
        if problem := _layer_decay_problem(self):
            raise ValueError(problem)
        parts = self.micro_batches(self.cluster.workers)
        if self.optimisation.batch_size % parts:
            raise ValueError(
                f"optimisation.batch_size {self.optimisation.batch_size} is not a multiple of "
                f"cluster.workers x optimisation.accumulation = {parts}"
            )
        steps = self.optimisation.steps
        if steps and (text := self.distillation.schedule_problem(steps, "optimisation.steps")):
            raise ValueError(text)
        return self

    def _unlabelled_images_teach(self) -> None:
        """Refuse images without labels that nothing is learnt from."""
        unlabelled, teacher = self.data.unlabelled, self.teacher
        if unlabelled is None:
            return
        if unlabelled.labels is not None:
            if teacher is not None and teacher.detections and not unlabelled.rest_of_train:
                raise ValueError(
                    "teacher.detections names images by their ids in data.train, which those of "
                    "data.unlabelled do not have: remove one of the two"
                )
            return
        method = self.distillation
        if not method.learns_without_labels:
            why = "its terms need ground truth" if method.needs_teacher else "it has no teacher"
            raise ValueError(
                f"data.unlabelled has no effect with distillation.method '{method.method}': {why}. "
                "Remove it, give it labels, or distil what a teacher says of any image, as 'd3etr' "
                "does"
            )
        if problem := self.composition_problem(self.micro_batches(self.cluster.workers)):
            raise ValueError(problem)

    def _views_are_of_something(self) -> None:
        """Refuse a number of views of images without labels where there are none."""
        unlabelled = self.data.unlabelled
        views = None if self.teacher is None else self.teacher.views
        if views is None or views.unlabelled_count is None:
            return
        if unlabelled is None or unlabelled.labels is not None:
            found = (
                "data.unlabelled is null" if unlabelled is None else "data.unlabelled has labels"
            )
            raise ValueError(f"teacher.views.unlabelled_count has no effect: {found}")

    def composition_problem(self, parts: int) -> str | None:
        """Why a batch of images with and without labels cannot be cut into micro-batches, or None.

        Args:
            parts: micro-batches; each needs an image with labels, as all losses come from each.
        """
        size = self.optimisation.batch_size
        without, unlabelled = self.data.unlabelled_in(size), self.data.unlabelled
        if unlabelled is None or unlabelled.labels or (without and size - without >= parts):
            return None
        return (
            f"data.unlabelled.share {unlabelled.share:g} of optimisation.batch_size "
            f"{size} makes {without} images without labels and {size - without} with; expected at "
            f"least 1 without, and 1 with for each of {parts} micro-batches "
            "(cluster.workers x optimisation.accumulation): change the share or the batch"
        )

    def steps_per_epoch(self, labelled: int) -> int:
        """Optimiser steps in which every training image with labels comes once.

        Args:
            labelled: images of the training split that have labels.
        """
        size = self.optimisation.batch_size
        return labelled // (size - self.data.unlabelled_in(size))

    def _criterion_fits(self) -> None:
        """Refuse settings of the class loss that the student does not learn by."""
        criterion, softmax = self.optimisation.set_criterion, self.student.detector.softmax_classes
        of_sigmoid = ("focal_alpha", "focal_gamma", "class_loss", "quality_alpha", "quality_gamma")
        for key in of_sigmoid if softmax else ("no_object_weight",):
            if getattr(criterion, key) != type(criterion).model_fields[key].default:
                kind = "softmax" if softmax else "sigmoid"
                name = "cross entropy" if softmax else f"{criterion.class_loss} loss"
                raise ValueError(
                    f"optimisation.set_criterion.{key} has no effect on a student with "
                    f"classification '{kind}', which learns by the {name}: remove it"
                )
        if idle := criterion.idle_quality_key():
            raise ValueError(
                f"optimisation.set_criterion.{idle} has no effect with class_loss 'focal', only "
                "with 'varifocal', 'mal' and 'ia_bce': remove it"
            )
        student = self.student.detector
        if not student.refines_distributions and (idle := criterion.idle_edges_key()):
            raise ValueError(
                f"optimisation.set_criterion.{idle} has no effect on detector '{student.name}', "
                "only on those that refine distributions of edges, 'd_fine' or 'deimv2': remove it"
            )


def _layer_decay_problem(config: Config) -> str | None:
    """Why ``layer_decay`` has no effect, or None."""
    rates, backbone = config.optimisation, config.student.detector.backbone
    if rates.layer_decay is None:
        return None
    if not backbone.has_blocks:
        return (
            f"optimisation.layer_decay has no effect on backbone '{backbone.name}', only on vision "
            "transformers ('vit' and timm's, such as 'timm/vit_small_patch16_dinov3')"
        )
    if not backbone.trainable or rates.backbone_rate_factor == 0:
        return "optimisation.layer_decay has no effect on a backbone that is frozen"
    return None


def _teacher_problem(config: Config) -> str | None:
    """Why what teaches does not go with the method, the student or its pictures, or None."""
    method, teacher, student = config.distillation, config.teacher, config.student.detector
    if not method.needs_teacher:
        return None
    kinds = method.teacher_kinds
    if teacher is None or all(getattr(teacher, kind) is None for kind in kinds):
        keys = " or ".join(f"teacher.{kind}" for kind in kinds)
        article = "a " if method.needs_network else ""
        return f"distillation.method '{method.method}' needs {article}{keys}"
    if not method.needs_network and student.softmax_classes:
        return (
            f"distillation.method '{method.method}' has scores as targets of single classes, but "
            "the student has classification 'softmax': set it to 'sigmoid'"
        )
    normalisation = config.data.preprocessing.normalisation
    if teacher.features is not None and normalisation != "imagenet":
        why = "cannot be undone" if normalisation == "per_image" else "is not undone for it"
        return (
            "teacher.features needs the student's pictures as they were, and "
            f"data.preprocessing.normalisation '{normalisation}' {why}: set it to 'imagenet'"
        )
    return method.student_problem(student)


def _views_problem(config: Config) -> str | None:
    """Why the augmentation of stored views would have to depend on the step, or None."""
    augmentation = config.data.augmentation
    if config.teacher is None or config.teacher.views is None:
        return None
    if augmentation.off_for_last_epochs:
        return (
            "teacher.views are as they were stored in all epochs, so data.augmentation."
            "off_for_last_epochs cannot switch anything off: set it to 0, or views to null"
        )
    if augmentation.shortest_sides and config.data.preprocessing.exact_size:
        return (
            "teacher.views have one size each, but with data.preprocessing.exact_size one of "
            "data.augmentation.shortest_sides is drawn for each batch: set shortest_sides or "
            "views to null"
        )
    return None


def _inheritance_problem(config: Config) -> str | None:
    """Why queries cannot be paired by number or by place, or None: they did not begin so."""
    teacher, start = config.teacher, config.student.initialise_from
    if not config.distillation.inherited_share or teacher is None:
        return None
    if config.student.detector.queries_need_images and config.teacher_scale != 1:
        return (
            "distillation.inherited_ratio pairs queries of one place, and teacher.image_scale "
            f"{config.teacher_scale:g} gives the teacher's feature levels other places: set it "
            "to 1, or inherited_ratio to 0"
        )
    found = "is null" if start is None else f"takes {', '.join(start.parts)}"
    if start is not None and {"decoder", "queries"} <= {*start.parts}:
        if config.initial_weights == teacher.weights:
            return None
        found = f"is from {config.initial_weights}, the teacher {teacher.weights}"
    return (
        "distillation.inherited_ratio pairs query i of the student with query i of the "
        f"teacher, but student.initialise_from {found}: take 'decoder' and 'queries' from the "
        "teacher's weights (initialise_from: {}), or set inherited_ratio to 0"
    )
