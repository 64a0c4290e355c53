"""Where a student's weights start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import changed, save_untrained
from tiny_runs import DETECTOR, MakeConfig, write_teacher

from d3etr.config.detector import InitialiseFromConfig, StudentConfig
from d3etr.config.load import load_config
from d3etr.config.problems import ConfigError
from d3etr.config.tree import Config
from d3etr.data.annotations import Category
from d3etr.data.splits import open_split
from d3etr.detectors.init_from import LoadedParts, part_of
from d3etr.detectors.weights import load_weights
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.init_student import build_student
from d3etr.engine.provenance import weight_digests
from d3etr.engine.run import run_training
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


def test_many_tensors_that_were_not_taken_are_counted_by_module() -> None:
    left = {f"encoder.layers.{n}.weight": "not there" for n in range(12)}
    taken = ("encoder.layers.0.bias", "decoder.norm")
    assert LoadedParts(taken, left).left_in_words().count("(not there)") == 12
    left["decoder.norm.bias"] = "not there"
    assert LoadedParts(taken, left).left_in_words() == (
        "encoder.layers (12 of 13 tensors), decoder.norm (1 of 2 tensors)"
    )


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


@pytest.mark.parametrize("two_stage", [True, False])
def test_places_of_a_picture_of_another_size_are_refused(two_stage: bool) -> None:
    stages = f"box_refinement: {two_stage}, two_stage: {two_stage}".lower()
    overrides = [
        "data.digit_scenes={}",
        "optimisation.steps=1",
        "teacher={weights: t.safetensors, image_scale: 2.0}",
        "distillation={method: d3etr, inherited_ratio: 0.5}",
        f"student={{initialise_from: {{}}, detector: {{name: deformable_detr, {stages}}}}}",
    ]
    if not two_stage:
        assert load_config(None, overrides).distillation.inherited_share == 0.5
        return
    with pytest.raises(ConfigError, match=r"teacher\.image_scale 2 gives the teacher's feature"):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("layers", "expected"), [("first", [0, 1]), ("uniform", [1, 3]), ((3, 0), [3, 0])]
)
def test_a_student_starts_from_the_layers_that_are_named(
    make_config: MakeConfig, tmp_path: Path, layers: Any, expected: list[int]
) -> None:
    config = make_config()
    deep = changed(DETECTOR, decoder_layers=4)
    save_untrained(tmp_path / "deep.safetensors", deep, config.data)
    config = started(config, tmp_path / "deep.safetensors", "decoder", decoder_layers=2)
    start = config.student.initialise_from
    assert start is not None
    start = InitialiseFromConfig.model_validate(start.model_dump() | {"layers": layers})
    student = config.student.model_copy(update={"initialise_from": start})
    config = config.model_copy(update={"student": student})
    ours = build_student(config, categories(config), quiet=False).state_dict()
    teacher = load_weights(tmp_path / "deep.safetensors")[0].state_dict()
    name = "decoder.layers.{}.self_attention.content.weight"
    for layer, there in enumerate(expected):
        assert torch.equal(ours[name.format(layer)], teacher[name.format(there)])


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ({"layers": (0,)}, r"layers is \[0\]: expected 2 entries"),
        ({"layers": (0, 9)}, r"each below 2 \(its decoder layers\)"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    make_config: MakeConfig, teacher_weights: Path, start: dict[str, Any], text: str
) -> None:
    config = started(make_config(), teacher_weights, "decoder", decoder_layers=2)
    chosen = InitialiseFromConfig.model_validate(
        {"weights": str(teacher_weights), "parts": ("decoder",), **start}
    )
    student = config.student.model_copy(update={"initialise_from": chosen})
    config = config.model_copy(update={"student": student})
    with pytest.raises(UserError, match=text):
        build_student(config, categories(config), quiet=False)
    with pytest.raises(ValidationError, match="no effect without 'decoder'"):
        InitialiseFromConfig.model_validate({"parts": ("heads",), "layers": "uniform"})


@pytest.mark.parametrize(("factor", "steps"), [(0.0, 4), (0.0, 2), (0.5, 4)])
def test_what_was_inherited_waits_for_the_new_backbone(
    make_config: MakeConfig, tmp_path: Path, factor: float, steps: int
) -> None:
    config = make_config(detector={"queries": 8}, optimisation={"steps": 4, "epochs": None})
    student = config.student.model_copy(update={"initialise_from": InitialiseFromConfig()})
    slow = {"inherited_rate_factor": factor, "inherited_warmup_steps": steps}
    optimisation = config.optimisation.model_copy(update=slow)
    config = config.model_copy(update={"student": student, "optimisation": optimisation})
    run_training(config, tmp_path / "run", SingleProcess(torch.device("cpu")))
    assert config.teacher is not None
    before, after = (
        load_weights(path)[0].state_dict()
        for path in (config.teacher.weights, tmp_path / "run" / "weights.safetensors")
    )
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    inherited = {name for name in before if part_of(name) in ("decoder", "heads", "queries")}
    assert (inherited <= frozen) == (factor == 0 and steps == 4)
    assert not torch.equal(before["projection.weight"], after["projection.weight"])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optimisation.inherited_rate_factor=0.5", "an effect together only: they are 0.5 and 0"),
        ("optimisation.inherited_warmup_steps=5", "an effect together only: they are 1 and 5"),
        (
            "optimisation={steps: 9, inherited_rate_factor: 0, inherited_warmup_steps: 5}",
            "inherited_rate_factor has no effect: student.initialise_from is null",
        ),
    ],
)
def test_a_start_that_has_no_effect_is_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(None, ["data.digit_scenes={}", "optimisation.steps=9", override])
