"""Tiny scenes, detectors and runs for the tests of training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import changed
from tiny_runs import DETECTOR, MakeConfig, write_teacher

from d3etr.config.data import AugmentationConfig, DataConfig, DigitScenesConfig, PreprocessingConfig
from d3etr.config.detector import StudentConfig, TeacherConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.infrastructure import RunConfig
from d3etr.config.training import EvaluationConfig, OptimisationConfig, ScheduleConfig
from d3etr.config.tree import Config
from d3etr.data.splits import open_split


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """24 training, 7 validation and 6 test scenes of 32 pixels, written once per session."""
    data = DataConfig(
        digit_scenes=DigitScenesConfig(
            root=tmp_path_factory.mktemp("scenes"),
            train_images=24,
            validation_images=7,
            test_images=6,
            image_size=32,
            maximum_objects=3,
            maximum_scale=16,
        ),
        preprocessing=PreprocessingConfig(
            normalisation="per_image", shortest_side=None, longest_side=None
        ),
        augmentation=AugmentationConfig(horizontal_flip=0.0, channel_permutation=0.5),
        workers=0,
    )
    open_split(data, "train")
    return data


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory, scenes: DataConfig) -> Path:
    """A teacher that knows nothing, with more queries than the student."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    write_teacher(path, scenes)
    return path


@pytest.fixture
def make_config(scenes: DataConfig, teacher_weights: Path) -> MakeConfig:
    """A distilled run of 2 epochs of 6 steps; keyword arguments replace settings by section."""

    def make(
        optimisation: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        detector: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        plain: bool = False,
    ) -> Config:
        settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3} | (optimisation or {})
        schedule = ScheduleConfig(kind="cosine", warmup_steps=2)
        student = StudentConfig(detector=changed(DETECTOR, **(detector or {})))
        return Config(
            run=RunConfig(**(run or {})),
            data=scenes,
            teacher=(
                None if plain else TeacherConfig(**({"weights": teacher_weights} | (teacher or {})))
            ),
            student=student,
            distillation=MethodConfig.parse({"method": "none" if plain else "d3etr"}),
            optimisation=OptimisationConfig(**({"schedule": schedule} | settings)),
            evaluation=EvaluationConfig(batch_size=4, **(evaluation or {})),
        )

    return make
