"""Where a student's weights start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import changed
from tiny_runs import DETECTOR, MakeConfig, write_teacher

from d3etr.config.detector import InitialiseFromConfig, StudentConfig
from d3etr.config.load import load_config
from d3etr.config.problems import ConfigError
from d3etr.config.tree import Config
from d3etr.data.annotations import Category
from d3etr.data.splits import open_split
from d3etr.detectors.init_from import part_of
from d3etr.detectors.weights import load_weights
from d3etr.engine.init_student import build_student
from d3etr.engine.provenance import weight_digests
from d3etr.errors import UserError


def started(config: Config, weights: Path, *parts: str, **changes: Any) -> Config:
    """The plain run whose student starts from parts of ``weights``."""
    student = StudentConfig.model_validate(
        {
            "detector": changed(DETECTOR, **changes),
            "initialise_from": {"weights": str(weights), "parts": parts},
        }
    )
    return config.model_copy(update={"student": student})


def categories(config: Config) -> tuple[Category, ...]:
    return open_split(config.data, "train").categories


def test_a_student_starts_from_a_teachers_parts(
    make_config: MakeConfig, teacher_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = started(make_config(), teacher_weights, "encoder", "decoder", "heads")
    with caplog.at_level(logging.WARNING):
        student = build_student(config, categories(config), quiet=False)
    assert not caplog.records
    teacher = load_weights(teacher_weights)[0].state_dict()
    for name, tensor in student.state_dict().items():
        if part_of(name) in ("encoder", "decoder", "heads"):
            assert torch.equal(tensor, teacher[name]), name
    assert student.training


def test_one_warning_names_every_tensor_that_was_not_taken(
    make_config: MakeConfig, teacher_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = started(make_config(), teacher_weights, "queries", "heads")
    others = tuple(Category(c.id, f"other {c.name}") for c in categories(config))
    with caplog.at_level(logging.WARNING):
        build_student(config, others, quiet=True)
        assert not caplog.records
        build_student(config, others, quiet=False)
    [record] = caplog.records
    for text in (
        "3 of the same parts start at random",
        "query_embedding.weight ([6, 32], there [8, 32])",
        "class_head.weight (of other classes there)",
        "class_head.bias (of other classes there)",
    ):
        assert text in record.getMessage()


def test_parts_that_cannot_fit_stop_the_run(
    make_config: MakeConfig, teacher_weights: Path, tmp_path: Path
) -> None:
    config = started(make_config(), teacher_weights, "decoder", heads=8)
    with pytest.raises(UserError, match=r"initialise_from\.weights .* 2 attention heads"):
        build_student(config, categories(config), quiet=False)
    config = make_config()
    preprocessing = config.data.preprocessing.model_copy(update={"normalisation": "imagenet"})
    write_teacher(tmp_path / "other.safetensors", config.data, preprocessing=preprocessing)
    config = started(config, tmp_path / "other.safetensors", "backbone")
    with pytest.raises(UserError, match="its backbone expects images with normalisation 'image"):
        build_student(config, categories(config), quiet=False)


def test_the_file_is_one_of_the_runs_inputs(make_config: MakeConfig, teacher_weights: Path) -> None:
    config = started(make_config(), teacher_weights, "encoder")
    digests = weight_digests(config)
    assert digests["student.initialise_from.weights"] == digests["teacher.weights"]
    assert "student.initialise_from.weights" not in weight_digests(make_config())


def test_without_a_file_of_its_own_a_student_inherits_the_teachers_decoder(
    make_config: MakeConfig, teacher_weights: Path
) -> None:
    config = make_config(detector={"queries": 8})
    student = config.student.model_copy(update={"initialise_from": InitialiseFromConfig()})
    config = config.model_copy(update={"student": student})
    ours = build_student(config, categories(config), quiet=False).state_dict()
    teacher = load_weights(teacher_weights)[0].state_dict()
    others = {part_of(name) for name in ours if not torch.equal(ours[name], teacher[name])}
    assert others == {"backbone", "encoder"}


def test_a_plain_student_must_say_whose_decoder_it_inherits() -> None:
    overrides = ["data.digit_scenes={}", "optimisation.steps=1", "student.initialise_from={}"]
    with pytest.raises(ConfigError, match=r"initialise_from\.weights is not set and there"):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parts": ("backbone",)}, "both start the backbone"),
        ({"parts": ()}, "at least 1 item"),
        ({"parts": ("heads", "heads")}, "names one twice"),
        ({"parts": ("neck",)}, "'backbone', 'encoder', 'decoder', 'heads' or 'queries'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, Any], text: str) -> None:
    settings = {
        "backbone_weights": "imagenet",
        "initialise_from": {"weights": "teacher.safetensors", **changes},
    }
    with pytest.raises(ValidationError) as caught:
        StudentConfig.model_validate(settings)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ("null", "is null"),
        ("{parts: [decoder, heads]}", "takes decoder, heads:"),
        ("{parts: [heads, queries]}", "takes heads, queries:"),
        ("{weights: other.safetensors}", r"is from \S*other\.safetensors, the teacher \S*t\.safe"),
        ("{}", None),
        ("{weights: t.safetensors}", None),
    ],
)
def test_queries_are_paired_by_number_only_where_they_were_the_teachers(
    start: str, text: str | None
) -> None:
    overrides = [
        "data.digit_scenes={}",
        "optimisation.steps=1",
        "teacher.weights=t.safetensors",
        "distillation={method: d3etr, inherited_ratio: 0.5}",
        f"student.initialise_from={start}",
    ]
    if text is None:
        assert load_config(None, overrides).distillation.inherited_share == 0.5
        return
    with pytest.raises(ConfigError, match=f"inherited_ratio .* student.initialise_from {text}"):
        load_config(None, overrides)
