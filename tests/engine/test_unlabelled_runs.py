"""Whole runs in which part of every batch has no labels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import train
from tiny_runs import MakeConfig, assert_same_run, losses

from d3etr.config.data import DigitScenesConfig, UnlabelledConfig
from d3etr.config.distillation import method_config
from d3etr.config.load import plain_tree, validate
from d3etr.config.tree import Config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.splits import open_split
from d3etr.distiller import Distiller
from d3etr.dry_run import make_plan
from d3etr.engine.build import build_models, open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.loop import TrainingLoop
from d3etr.engine.provenance import Inputs
from d3etr.errors import UserError
from d3etr.files import read_json
from d3etr.structures import ImageBatch


@pytest.fixture
def mixed(make_config: MakeConfig) -> Config:
    """Half of the labels; three epochs of six steps of two images with and two without."""
    config = make_config(optimisation={"epochs": 2})
    data = config.data.model_copy(
        update={"labelled_share": 0.5, "unlabelled": UnlabelledConfig(rest_of_train=True)}
    )
    return config.model_copy(update={"data": data})


def test_a_run_resumes_bit_for_bit(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train(mixed, tmp_path / "whole")
    assert summary["steps"] == 12, "epochs are those of the 12 images with labels, two a step"
    finish, calls = TrainingLoop._finish_epoch, []

    def stop_after_the_first(self: TrainingLoop) -> None:
        finish(self)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_finish_epoch", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(mixed, tmp_path / "broken")
    train(mixed, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_losses_do_not_depend_on_how_a_batch_is_cut(mixed: Config, tmp_path: Path) -> None:
    config = mixed.model_copy(
        update={
            "student": mixed.student.model_copy(
                update={"detector": mixed.student.detector.model_copy(update={"dropout": 0.0})}
            )
        }
    )
    optimisation = config.optimisation.model_copy(update={"accumulation": 2})
    train(config, tmp_path / "whole")
    train(config.model_copy(update={"optimisation": optimisation}), tmp_path / "cut")
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert cut == pytest.approx(whole, rel=1e-3)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)


def test_plain_steps_leave_images_without_labels_out(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_config(method="d3etr", every_steps=2)
    seen: list[int] = []
    forward = Distiller.forward

    def watched(self: Distiller, images: ImageBatch, *rest: Any, **more: Any) -> Any:
        seen.append(len(images.pixels))
        return forward(self, images, *rest, **more)

    monkeypatch.setattr(Distiller, "forward", watched)
    train(mixed.model_copy(update={"distillation": method}), tmp_path / "run")
    assert sorted(seen) == [2] * 6 + [4] * 6


def test_digests_name_the_images(mixed: Config) -> None:
    context = SingleProcess(torch.device("cpu"))
    splits = open_splits(mixed, context)
    digests = build_models(mixed, splits, context).digests
    assert {"the unlabelled data", "the unlabelled images"} <= digests.keys()
    half = open_splits(
        mixed.model_copy(update={"data": mixed.data.model_copy(update={"unlabelled": None})}),
        context,
    )
    assert half.train.left_out and half.train.unlabelled is None


def test_a_dry_run_counts_both_parts(mixed: Config, tmp_path: Path) -> None:
    plan = make_plan(mixed)
    assert (plan.images, plan.unlabelled, plan.steps_per_epoch, plan.steps) == (12, 12, 6, 12)
    scenes = mixed.data.digit_scenes
    assert scenes is not None
    other = scenes.model_copy(update={"seed": 1, "train_images": 30, "root": tmp_path / "no"})
    data = mixed.data.model_copy(
        update={"labelled_share": 1.0, "unlabelled": UnlabelledConfig(digit_scenes=other)}
    )
    plan = make_plan(mixed.model_copy(update={"data": data}))
    assert (plan.images, plan.unlabelled, plan.steps_per_epoch) == (24, 30, 12)
    assert not (tmp_path / "no").exists()


def test_scenes_of_another_seed(mixed: Config, tmp_path: Path) -> None:
    scenes = mixed.data.digit_scenes
    assert scenes is not None
    other: DigitScenesConfig = scenes.model_copy(
        update={"seed": 1, "train_images": 6, "validation_images": 1, "test_images": 1}
    )
    unlabelled = UnlabelledConfig(digit_scenes=other, share=0.25)
    data = mixed.data.model_copy(update={"labelled_share": 1.0, "unlabelled": unlabelled})
    found = open_split(data, "train").unlabelled
    assert found is not None and len(found.records) == 6 and not len(found.objects.labels)
    train(mixed.model_copy(update={"data": data}), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 16


def test_too_few_unlabelled_images_are_refused(mixed: Config) -> None:
    data = mixed.data.model_copy(update={"labelled_share": 0.96})
    few = mixed.model_copy(update={"data": data})
    with pytest.raises(UserError, match=r"1 images without labels, fewer than the 2 of one batch"):
        make_plan(few)
    with pytest.raises(UserError, match=r"1 images without labels"):
        open_splits(few, SingleProcess(torch.device("cpu")))


@pytest.fixture
def labelled(mixed: Config, tmp_path: Path) -> Config:
    """The other half has labels of a file: the scenes' own, on ten of the twelve images."""
    scenes = mixed.data.digit_scenes
    assert scenes is not None
    place, file = write_digit_scenes(scenes)["train"], tmp_path / "labels.json"
    assert isinstance(place.annotations, Path)
    content = json.loads(place.annotations.read_bytes())
    split = open_split(mixed.data, "train").unlabelled
    assert split is not None
    kept = {record.id for record in split.records[2:]}
    content["images"] = [image for image in content["images"] if image["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    file.write_text(json.dumps(content))
    unlabelled = UnlabelledConfig(rest_of_train=True, labels=file)
    data = mixed.data.model_copy(update={"unlabelled": unlabelled})
    plain = {"teacher": None, "distillation": method_config(method="none")}
    return mixed.model_copy(update={"data": data} | plain)


def test_images_that_a_file_labels_are_ordinary_ones(labelled: Config, tmp_path: Path) -> None:
    validate(plain_tree(labelled), "the test", [])
    plan = make_plan(labelled)
    assert (plan.images, plan.unlabelled, plan.steps_per_epoch) == (24 - 2, 0, 5)
    summary = train(labelled, tmp_path / "run")
    assert summary["steps"] == 10 and summary["unlabelled_images"] == 10
    inputs = read_json(tmp_path / "run" / "summary.json")["inputs"]
    assert inputs.keys() >= {"the unlabelled data", "data.unlabelled.labels"}
    Inputs().ensure_result_is_of(labelled, tmp_path / "run")
    assert labelled.data.unlabelled is not None
    file = labelled.data.unlabelled.labels
    assert isinstance(file, Path)
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=r"data\.unlabelled\.labels is not what the run"):
        Inputs().ensure_result_is_of(labelled, tmp_path / "run")


def test_views_of_images_that_a_file_labels(
    mixed: Config, labelled: Config, tmp_path: Path
) -> None:
    tree = plain_tree(labelled) | {name: plain_tree(mixed)[name] for name in ("distillation",)}
    tree["teacher"] = plain_tree(mixed)["teacher"] | {"views": {"count": 2}}
    tree["run"] = {"output": str(tmp_path)}
    train(validate(tree, "the test", []), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 10


def test_boxes_in_files_know_ids_of_the_training_annotations_only(
    mixed: Config, tmp_path: Path
) -> None:
    tree = plain_tree(mixed) | {"distillation": {"method": "teach_detr"}}
    tree["teacher"] = {"detections": [str(tmp_path / "found.json")]}
    labels = {"labels": "labels.json"}
    tree["data"]["unlabelled"] = {"rest_of_train": True} | labels
    validate(tree, "the test", [])
    tree["data"]["unlabelled"] = {"digit_scenes": {"seed": 9}} | labels
    with pytest.raises(UserError, match=r"teacher\.detections names images by their ids"):
        validate(tree, "the test", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"method": "none"}, "teacher": None}, "it has no teacher"),
        (
            {"distillation": {"method": "detrdistill", "prediction": {"weight": 0.0}}},
            "its terms need ground truth",
        ),
        (
            {"optimisation": {"steps": 5, "batch_size": 8, "accumulation": 8}},
            "1 with for each of 8",
        ),
        ({"optimisation": {"steps": 5, "batch_size": 1}}, "makes 0 images without labels"),
    ],
)
def test_settings_without_effect_are_refused(
    mixed: Config, changes: dict[str, Any], message: str
) -> None:
    tree = mixed.model_dump(mode="json") | changes
    with pytest.raises(UserError, match=message):
        validate(tree, "the test", [])
    assert method_config(method="d3etr").learns_without_labels
