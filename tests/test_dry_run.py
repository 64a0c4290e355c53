"""What --dry-run says, and that it does nothing else."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from d3etr.cli.main import main
from d3etr.config.load import load_config, validate
from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector, count_parameters
from d3etr.detectors.weights import WeightsInfo, save_weights
from d3etr.dry_run import describe, describe_json, make_plan
from d3etr.errors import UserError
from d3etr.launch.api import launch

SMALL = (
    "student.detector={width: 16, heads: 2, feedforward: 16, encoder_layers: 1, "
    "decoder_layers: 2, queries: 5, backbone: {name: small, stem_width: 8, stage_widths: [8, 8]}}"
)


def config(*overrides: str) -> Config:
    base = ["data.digit_scenes={train_images: 100}", "optimisation={epochs: 3, batch_size: 8}"]
    return load_config(None, [*base, SMALL, *overrides])


def own_data(folder: Path, images: int) -> str:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    entries = [{"id": i, "file_name": "a.png", "width": 8, "height": 8} for i in range(images)]
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}
    content = {"images": entries, "annotations": [box], "categories": [{"id": 1, "name": "0"}]}
    (folder / "a.json").write_text(json.dumps(content))
    split = f"{{images: {folder}, annotations: {folder}/a.json}}"
    return f"data={{train: {split}, validation: {split}}}"


def saved_teacher(folder: Path, classes: int, *overrides: str) -> tuple[str, torch.nn.Module]:
    """The setting that names the file of an untrained detector, and the detector."""
    torch.manual_seed(0)
    detector = config(*overrides).student.detector
    teacher = build_detector(detector, classes)
    info = WeightsInfo(
        detector=detector,
        categories=tuple((i, str(i)) for i in range(classes)),
        preprocessing=config().data.preprocessing,
    )
    save_weights(folder / "t.safetensors", teacher, info)
    return f"teacher.weights={folder}/t.safetensors", teacher


def test_steps_and_checkpoints_follow_from_epochs() -> None:
    plan = make_plan(config())
    assert (plan.images, plan.steps_per_epoch, plan.steps) == (100, 12, 36)
    assert plan.checkpoints == (12, 24, 36)


def test_images_that_are_learnt_and_measured_are_warned_of(tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    asked, other = (
        load_config(None, [SMALL, own_data(place, 9), "optimisation={epochs: 1, batch_size: 2}"])
        for place in (tmp_path, folder)
    )
    text = "data.validation: 9 of its 9 images are data.train's too, so results on it are too good"
    assert any(text in warning for warning in make_plan(asked).warnings)
    apart = asked.data.model_copy(update={"validation": other.data.validation})
    warnings = make_plan(asked.model_copy(update={"data": apart})).warnings
    assert not any("too good" in warning for warning in warnings)


def test_a_run_that_ends_within_an_epoch_has_a_last_checkpoint() -> None:
    plan = make_plan(config("optimisation={steps: 30, batch_size: 8}"))
    assert (plan.steps, plan.checkpoints) == (30, (12, 24, 30))


def test_checkpoints_are_as_rare_or_frequent_as_configured() -> None:
    assert make_plan(config("run.checkpoint_every_epochs=2")).checkpoints == (24, 36)
    assert make_plan(config("run.checkpoint_every_steps=10")).checkpoints == (
        10,
        12,
        20,
        24,
        30,
        36,
    )


def test_parameters_are_those_of_the_detectors(tmp_path: Path) -> None:
    weights, teacher = saved_teacher(tmp_path, 10, "student.detector.queries=7")
    plan = make_plan(config(weights, "distillation.method=d3etr"))
    assert plan.teacher_parameters == count_parameters(teacher)
    assert plan.student_parameters == count_parameters(
        build_detector(config().student.detector, 10)
    )


def test_the_steps_that_distil_are_counted(tmp_path: Path) -> None:
    weights, _ = saved_teacher(tmp_path, 10)
    always = config(weights, "distillation.method=d3etr")
    assert make_plan(config()).distilled_steps == 0 and make_plan(always).distilled_steps == 36
    assert "distilled " not in describe(always)
    some = config(weights, "distillation={method: d3etr, every_steps: 3, share_of_training: 0.5}")
    assert make_plan(some).distilled_steps == 6
    assert "distilled    6 of the steps; the others are plain ones" in describe(some)


def test_own_data_is_counted(tmp_path: Path) -> None:
    plan = make_plan(config("data=null", own_data(tmp_path, 20)))
    assert (plan.images, plan.classes, plan.steps_per_epoch) == (20, 1, 2)


def test_too_few_images_are_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 images, fewer than one batch"):
        make_plan(config("data=null", own_data(tmp_path, 7)))


def test_a_missing_teacher_is_found_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        make_plan(config("teacher.weights=nowhere.safetensors", "distillation.method=d3etr"))


def test_a_teacher_that_cannot_teach_is_found_before_anything_starts(tmp_path: Path) -> None:
    weights, _ = saved_teacher(tmp_path, 10, "student.detector.heads=4")
    with pytest.raises(UserError, match=r"distillation\.self_attention.*heads"):
        make_plan(config(weights, "distillation.method=d3etr"))
    weights, _ = saved_teacher(tmp_path, 1)
    one_class = config("data=null", own_data(tmp_path, 20), weights, "distillation.method=kd_detr")
    with pytest.raises(UserError, match=r"one class.*prediction\.class_loss"):
        make_plan(one_class)


def test_the_text_holds_the_resolved_configuration_and_the_size() -> None:
    text = describe(config())
    assert "learning_rate: 0.0001" in text
    assert "36 steps, 3 epochs of 12" in text
    assert "3, after step 12, 24, 36; the newest 2 are kept" in text


def test_the_json_loads_as_a_configuration() -> None:
    said = json.loads(json.dumps(describe_json(config())))
    assert validate(said["config"], "the dry run") == config()
    assert said["steps"] == 36


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    describe(config())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("student.backbone_weights", ()),
        ("teacher.weights", ("distillation.method=d3etr",)),
        ("student.initialise_from.weights", ("student.initialise_from.parts=[decoder]",)),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_weights_that_cannot_be_used_are_named_before_anything_starts(
    key: str, overrides: tuple[str, ...], content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    if content is not None:
        file.write_bytes(content)
    asked = config(*overrides, f"{key}={file}", f"run.output={tmp_path / 'runs'}")
    for judge in (make_plan, lambda asked: launch(asked, launcher="local", quiet=True)):
        with pytest.raises(UserError, match=rf"^{key}: .*w\.safetensors"):
            judge(asked)
    assert not (tmp_path / "runs").exists(), "no run folder, no run in MLflow"


def test_a_frozen_backbone_without_weights_is_refused_in_a_dry_run_too() -> None:
    with pytest.raises(UserError, match=r"student\.backbone_weights is null"):
        make_plan(config("student.detector.backbone={name: resnet18}"))


def test_more_checkpoints_than_anyone_keeps_are_refused_before_they_are_counted_out() -> None:
    with pytest.raises(UserError, match="would write 83,333,333 checkpoints: save more rarely"):
        make_plan(config("optimisation={steps: 999999999, batch_size: 8}"))


def test_a_dry_run_without_a_recipe_does_not_start_the_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run"]) == 2
    assert "Name one, for example digits/d3etr" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
