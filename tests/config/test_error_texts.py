"""The texts that a person with a mistake in a recipe reads."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from d3etr.config.load import load_config
from d3etr.config.problems import ConfigError, models_in
from d3etr.config.sweep import SweepConfig, load_sweep
from d3etr.config.tree import Config
from d3etr.errors import UserError

BASE = ("data.digit_scenes={}", "optimisation.steps=10")


def refusal(*overrides: str, base: tuple[str, ...] = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*base, *overrides])
    return str(caught.value)


def file_refusal(path: Path, text: str) -> str:
    path.write_text(text)
    return refusal_of(path)


def refusal_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path)
    return str(caught.value)


def test_every_problem_is_listed_at_once_under_the_recipes_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = file_refusal(
        path,
        "run: {sed: 1}\n"
        "data: {digit_scenes: {image_size: 8}}\n"
        "optimisation: {steps: many, batch_size: 0}\n",
    )
    assert text.splitlines() == [
        f"Found 4 problems in {path}:",
        "  - run.sed: unknown key; did you mean 'seed'?",
        "  - data.digit_scenes.image_size: found 8, expected at least 32",
        "  - optimisation.steps: found 'many', expected an integer",
        "  - optimisation.batch_size: found 0, expected at least 1",
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed=x", "run.seed: found 'x', expected an integer (from --set)"),
        ("run.seed=1.5", "run.seed: found 1.5, expected an integer (from --set)"),
        ("run.name=[a]", "run.name: found ['a'], expected text (from --set)"),
        (
            "run.output=3",
            "run.output: found 3, expected a path: quote what reads as a number or as true, --set "
            "\"run.output='...'\" (from --set)",
        ),
        ("evaluation=null", "evaluation: found null, expected a section (from --set)"),
        ("evaluation.test=1", "evaluation.test: found 1, expected true or false (from --set)"),
        (
            "optimisation.learning_rate=.inf",
            "optimisation.learning_rate: found inf, expected a finite number (from --set)",
        ),
        (
            "optimisation.learning_rate=0",
            "optimisation.learning_rate: found 0, expected above 0 (from --set)",
        ),
        (
            "student.detector.backbone.name=resnet51",
            "student.detector.backbone.name: found 'resnet51', expected 'small', 'vit', "
            "'dinov3', timm/NAME, a ResNet-vd or a torchvision network with feature maps; did you "
            "mean resnet50, resnet18, resnet152? (from --set)",
        ),
        (
            "student.detector.backbone.name=vit_b_16",
            "student.detector.backbone.name: found 'vit_b_16', expected 'small', 'vit', "
            "'dinov3', timm/NAME, a ResNet-vd or a torchvision network with feature maps, for "
            "example resnet18, convnext_tiny, swin_t, efficientnet_b0, mobilenet_v2, "
            "regnet_x_400mf, densenet121, mnasnet0_5, shufflenet_v2_x0_5, vgg11_bn, vgg11, "
            "resnet18vd (from --set)",
        ),
        (
            "student.detector.backbone={name: swin_t, norm: group}",
            "student.detector.backbone.norm: norm has no effect on backbone 'swin_t': it has no "
            "batch norm to replace (from --set)",
        ),
        (
            "student.detector.backbone.stage_widths=[8, x]",
            "student.detector.backbone.stage_widths[1]: found 'x', expected an integer "
            "(from --set)",
        ),
        (
            "cluster.gpus_per_worker=all",
            "cluster.gpus_per_worker: found 'all', expected a number or one of 'auto' (from --set)",
        ),
    ],
)
def test_a_bad_value_is_shown_with_what_is_allowed(override: str, line: str) -> None:
    assert f"  - {line}" in refusal(override).splitlines()


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("optimization={}", "did you mean 'optimisation'?"),
        ("epochs=1", "did you mean 'optimisation.epochs'?"),
        ("student.heads=1", "did you mean 'student.detector.heads'?"),
        ("evaluation.zzz=1", "expected one of: every_epochs, every_steps, batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(override: str, advice: str) -> None:
    key = override.partition("=")[0]
    assert f"  - {key}: unknown key; {advice}" in refusal(override)


def test_a_missing_section_is_named() -> None:
    assert "data: is missing and has no default" in refusal(base=("optimisation.steps=1",))


def test_a_rule_between_keys_carries_the_sections_path() -> None:
    text = refusal("data.digit_scenes.minimum_objects=9", "optimisation.epochs=1")
    assert "  - data.digit_scenes.minimum_objects: minimum_objects is above maximum_objects" in text
    assert "  - optimisation: needs exactly one of epochs and steps" in text


def test_a_rule_between_sections_names_both_keys() -> None:
    text = refusal("cluster.workers=3")
    assert "optimisation.batch_size 16 is not a multiple of cluster.workers" in text
    text = refusal("optimisation.sampling_rate_factor=0.1")
    assert "sampling_rate_factor has no effect on detector 'conditional_detr'" in text


def test_decay_by_layers_is_for_trained_vision_transformers() -> None:
    text = refusal("optimisation.layer_decay=0.8")
    assert "optimisation.layer_decay has no effect on backbone 'resnet50'" in text
    vit = ("optimisation.layer_decay=0.8", "student.detector.backbone={name: vit}")
    for frozen in ("student.detector.backbone.trainable", "optimisation.backbone_rate_factor"):
        value = "false" if frozen.endswith("trainable") else "0.0"
        text = refusal(*vit, f"{frozen}={value}")
        assert "layer_decay has no effect on a backbone that is frozen" in text


def test_settings_of_the_class_loss_belong_to_the_students_classification() -> None:
    softmax = ("student.detector.name=detr", "student.detector.classification=softmax")
    criterion = "optimisation.set_criterion"
    text = refusal(f"{criterion}.focal_gamma=1.5", *softmax)
    assert f"{criterion}.focal_gamma has no effect on a student with classification" in text
    text = refusal(f"{criterion}.no_object_weight=0.2")
    assert f"{criterion}.no_object_weight has no effect on a student with classification" in text
    for setting in ("class_loss=varifocal", "quality_alpha=0.5", "quality_gamma=1"):
        text = refusal(f"{criterion}.{setting}", *softmax)
        key = setting.partition("=")[0]
        assert f"{criterion}.{key} has no effect on a student with classification" in text


def test_settings_of_a_class_loss_belong_to_it() -> None:
    criterion = "optimisation.set_criterion"
    text = refusal(f"{criterion}.quality_gamma=1.5")
    assert f"{criterion}.quality_gamma has no effect with class_loss 'focal'" in text
    boxes = ("distillation.method=teach_detr", "teacher.detections=boxes.json")
    text = refusal("distillation.set_criterion.class_loss=mal", *boxes)
    assert "set_criterion.class_loss 'mal' has the IoU as class target" in text
    text = refusal("distillation.set_criterion.quality_alpha=1", *boxes)
    assert "set_criterion.quality_alpha has no effect with class_loss 'focal'" in text


def test_settings_of_edges_belong_to_detectors_that_refine_them() -> None:
    criterion = "optimisation.set_criterion"
    for setting in ("fgl_weight=0.3", "ddf_weight=0", "union_matching=true"):
        text = refusal(f"{criterion}.{setting}")
        key = setting.partition("=")[0]
        assert f"{criterion}.{key} has no effect on detector 'conditional_detr'" in text
    boxes = ("distillation.method=teach_detr", "teacher.detections=boxes.json")
    text = refusal("distillation.set_criterion.ddf_weight=1", *boxes)
    assert "set_criterion.ddf_weight has no effect: of a teacher's boxes" in text


def test_a_setting_without_effect_is_refused() -> None:
    text = refusal("distillation.warmup_steps=3")
    assert "  - distillation.warmup_steps: has no effect on method 'none', only on" in text


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed", "--set 'run.seed': expected KEY=VALUE such as run.seed=1"),
        ("run..seed=1", "--set 'run..seed=1': expected KEY=VALUE such as run.seed=1"),
        (
            "optimisation.steps.x=1",
            "--set 'optimisation.steps.x=1': 'steps' is 10, not a section",
        ),
        ("run.name=[1", "run.name: --set value '[1': line 1, column 3:"),
    ],
)
def test_a_malformed_override_is_shown(override: str, line: str) -> None:
    assert f"  - {line}" in refusal(override)


def test_broken_yaml_is_located(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    text = file_refusal(path, "run:\n  name: [a\ndata: {}\n")
    assert text.startswith(f"Found 1 problem in {path}:\n  - line 3, column ")


def test_a_key_given_twice_is_located(tmp_path: Path) -> None:
    text = file_refusal(tmp_path / "twice.yaml", "run: {}\ndata: {}\nrun: {}\n")
    assert "line 3, column 1: key 'run' is given twice" in text


@pytest.mark.parametrize(
    "value", ["!!set {a}", "!!python/object/apply:os.getcwd []", "!!binary aa"]
)
def test_yaml_that_is_not_plain_data_is_refused(tmp_path: Path, value: str) -> None:
    text = file_refusal(tmp_path / "tag.yaml", f"run: {value}\n")
    assert "line 1, column 6: could not determine a constructor" in text


@pytest.mark.parametrize("content", ["- a\n", "text\n", "3\n"])
def test_a_recipe_without_sections_is_refused(tmp_path: Path, content: str) -> None:
    text = file_refusal(tmp_path / "list.yaml", content)
    assert "expected sections such as 'run:' and 'data:'" in text


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 text.*save it as UTF-8"):
        load_config(path)


@pytest.mark.parametrize("read", [load_config, load_sweep])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("run: {}\n".encode("utf-16"), "UTF-16 text (byte 0): save it as UTF-8"),
        ("run: {name: Grün}\n".encode("latin-1"), "not UTF-8 text (byte 14): save it as UTF-8"),
        (b"run: " + b"[" * 100_000, "is nested deeper than 40 levels"),
        (b"run: " + b"[" * 60 + b"]" * 60, "is nested deeper than 40 levels"),
        (
            b"run: &a [*a]\n",
            "line 1, column 10: an alias stands for something that it is a part",
        ),
        (b"run: &a\n  <<: *a\n", "an alias stands for something that it is a part of"),
        (
            b"run: {seed: 1" + b"0" * 5000 + b"}\n",
            "line 1, column 13: found a number of 5,001 digits",
        ),
        (b"run: #" + b"x" * 600_000, "is larger than 500,000 bytes: this is no recipe"),
    ],
)
def test_a_file_that_cannot_be_a_recipe_says_why(
    tmp_path: Path, read: Callable[[Path], object], content: bytes, problem: str
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert problem in str(caught.value)


@pytest.mark.parametrize("read", [load_config, load_sweep])
@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}", "{{k: [{}]}}"])
def test_aliases_that_multiply_are_refused_before_they_take_memory(
    tmp_path: Path, read: Callable[[Path], object], link: str
) -> None:
    lines = ["a0: &a0 {x: 1}" if "<<" in link else "a0: &a0 [x]"]
    for level in range(1, 13):
        lines.append(f"a{level}: &a{level} " + link.format(", ".join([f"*a{level - 1}"] * 9)))
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="aliases make more than 20,000 values"):
        read(path)
    assert time.monotonic() - begun < 5


def test_aliases_of_ordinary_size_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "\ufeff"
        "data: {digit_scenes: &scenes {train_images: 7}}\n"
        "optimisation: {steps: 1}\n"
        "student: {detector: {backbone: {name: small, stage_widths: &widths [8, 8]}}}\n"
    )
    scenes = load_config(path).data.digit_scenes
    assert scenes is not None and scenes.train_images == 7


def test_recipes_that_extend_each_other_widely_are_read_once_each(tmp_path: Path) -> None:
    for level in range(25):
        text = "run: {}" if level == 0 else f"extends: [{level - 1}.yaml, {level - 1}.yaml]"
        (tmp_path / f"{level}.yaml").write_text(text)
    assert "data: is missing" in refusal_of(tmp_path / "24.yaml")


def test_a_missing_recipe_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "teacher.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"No such file.*did you mean '.*teacher\.yaml'"):
        load_config(tmp_path / "teachr.yaml")


def test_extends_must_name_files(tmp_path: Path) -> None:
    text = file_refusal(tmp_path / "odd.yaml", "extends: {a: b}\n")
    assert "extends: found a section, expected a file name or a list of them" in text


def test_two_lengths_come_with_the_remedy() -> None:
    text = refusal("optimisation.epochs=5")
    assert "but epochs is 5 and steps is 10: set the other one to null" in text
    assert "--set optimisation.epochs=null" in text


def numbers(annotation: Any, marks: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The marks (bounds) of every number that an annotation allows."""
    if annotation in (int, float):
        yield marks
    for part in get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]:
        below = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
        yield from numbers(part, tuple(m for b in below for m in getattr(b, "metadata", [b])))


def numeric_fields(section: type[BaseModel], at: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, field in section.model_fields.items():
        direct = field.annotation in (int, float)
        own = tuple(field.metadata)
        for marks in [own] if direct else numbers(field.annotation, own):
            yield at + name, marks or own
        for below in models_in(field.annotation):
            yield from numeric_fields(below, f"{at}{name}.")


@pytest.mark.parametrize("tree", [Config, SweepConfig])
def test_every_number_has_bounds(tree: type[BaseModel]) -> None:
    found = list(numeric_fields(tree))
    assert len(found) > 5
    for path, marks in found:
        ends = {type(mark) for mark in marks}
        assert ends & {Ge, Gt} and ends & {Le, Lt}, path


@pytest.mark.parametrize("value", [str(10**29), "-1" + "0" * 28, "1e300"])
@pytest.mark.parametrize(
    "key", ["optimisation.steps", "student.detector.width", "evaluation.maximum_detections"]
)
def test_absurd_numbers_are_refused_with_the_limit(key: str, value: str) -> None:
    assert re.search(
        rf"  - {key}: found .*, expected (at (most|least)|an integer)", refusal(f"{key}={value}")
    )


def test_an_unknown_key_with_a_dot_in_it_is_named(tmp_path: Path) -> None:
    text = file_refusal(tmp_path / "r.yaml", "learning.rate: {x: 1}\noptimisation: {a.b: 1}\n")
    assert "  - learning.rate: unknown key; expected one of: run, data" in text
    assert "  - optimisation.a.b: unknown key" in text


def test_problems_below_a_mapping_carry_its_key(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nrecipe: r.yaml\nspace: {a.b: {grid: null}, c: text}\n")
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert "  - space.a.b: needs one of grid, choice" in str(caught.value)
    assert "  - space.c: found 'text', expected a section" in str(caught.value)
