"""Stored teacher views of images with labels and of those without."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_remote_inputs import over_http
from engine.test_views import (
    assert_stored_the_same,
    placed,
    shards,
    taught_by,
    train,
    with_views,
)
from engine.test_workers import train_with_two_workers
from PIL import Image
from tiny_runs import MakeConfig, assert_same_run, losses

from d3etr.config.data import DataConfig, DigitScenesConfig, UnlabelledConfig
from d3etr.config.tree import Config
from d3etr.data.loading import EpochLoader
from d3etr.data.views import TeacherViews
from d3etr.distiller import Distiller
from d3etr.dry_run import describe, describe_json
from d3etr.engine.build import build_models, open_loader, open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.step_costs import StepMaker
from d3etr.engine.view_store import ViewStore
from d3etr.engine.views import forecast_views, prepare_views
from d3etr.errors import UserError

CONTEXT = SingleProcess(torch.device("cpu"))


def mixed(config: Config, **views: Any) -> Config:
    """With views; 12 images with labels and 12 without, two of each in a batch."""
    data = config.data.model_copy(
        update={"labelled_share": 0.5, "unlabelled": UnlabelledConfig(rest_of_train=True)}
    )
    return with_views(config.model_copy(update={"data": data}), **views)


def on(config: Config, data: DataConfig) -> Config:
    return config.model_copy(update={"data": data})


def opened(config: Config) -> tuple[Distiller, EpochLoader]:
    splits = open_splits(config, CONTEXT)
    models = build_models(config, splits, CONTEXT)
    loader = open_loader(config, splits.train, CONTEXT)
    loader.use_views(*prepare_views(config, splits.train, models, CONTEXT))
    return models.distiller, loader


def stores(config: Config) -> list[ViewStore]:
    splits = open_splits(config, CONTEXT)
    models = build_models(config, splits, CONTEXT)
    assert models.teacher is not None and splits.train.unlabelled is not None
    given = models.teacher, models.distiller.method, models.digests, CONTEXT
    return [ViewStore(config, part, *given) for part in (splits.train, splits.train.unlabelled)]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("variant", ["conditional_detr", "deformable-two-stage"])
def test_losses_are_those_of_the_teacher_on_the_same_pictures(
    make_config: MakeConfig, tmp_path: Path, variant: str, precision: str
) -> None:
    config = taught_by(variant, make_config, tmp_path)
    config = mixed(config, method={}, precision=precision, unlabelled_count=3)
    flips = config.data.augmentation.model_copy(update={"horizontal_flip": 0.5})
    config = placed(on(config, config.data.model_copy(update={"augmentation": flips})), tmp_path)
    distiller, loader = opened(config)
    rounding = 1e-5 if precision == "float32" else 1e-2  # which may pair others too
    for [(images, targets)] in loader.epoch(0):
        assert targets.labelled == 2 and len(images.pixels) == 4 and images.stored is not None
        terms = []
        for shown in (images, replace(images, stored=None)):
            teacher = distiller.run_teacher(shown)
            terms.append(
                distiller(images, targets, teacher, distiller.normalisers(targets, teacher))
            )
        stored, running = ({name: x.item() for name, x in each.items()} for each in terms)
        assert any("attention" in name for name in stored)
        assert stored == pytest.approx(running, rel=rounding, abs=rounding / 10)


def test_both_kinds_of_images_draw_among_views_of_their_own(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing runs the teacher in a step."""
    read: list[tuple[str, int]] = []
    real = TeacherViews.record

    def watched(views: TeacherViews, index: int, epoch: int) -> Any:
        read.append((views.folder.name, views.view(epoch, index)))
        return real(views, index, epoch)

    monkeypatch.setattr(TeacherViews, "record", watched)
    config = placed(mixed(make_config(optimisation={"epochs": 4}), unlabelled_count=3), tmp_path)
    train(config, tmp_path / "run")
    labelled, others = (store.folder.name for store in stores(config))
    seen = {name: [view for folder, view in read if folder == name] for name in (labelled, others)}
    assert [len(views) for views in seen.values()] == [4 * 12, 4 * 12]
    assert [set(views) for views in seen.values()] == [{0, 1}, {0, 1, 2}]
    assert len(shards(tmp_path)) == 2 + 3


@pytest.mark.parametrize("bucket", [True, False])
def test_every_k_passes_over_images_without_labels_show_each_view_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: bool
) -> None:
    """Also where an epoch ends within a pass: 14 of 9 images each, in views of other sizes."""
    read: list[tuple[str, int, int, int]] = []
    real = TeacherViews.record

    def watched(views: TeacherViews, index: int, number: int) -> Any:
        read.append((views.folder.name, index, number, views.view(number, index)))
        return real(views, index, number)

    monkeypatch.setattr(TeacherViews, "record", watched)
    config = mixed(make_config(optimisation={"epochs": 4}), unlabelled_count=3)
    config = placed(config, tmp_path)
    augmentation = {"crop": 0.7, "shortest_sides": (32, 48, 64)}
    sizes = config.data.augmentation.model_copy(update=augmentation)
    changes = {"labelled_share": 15 / 24, "augmentation": sizes, "bucket_by_aspect": bucket}
    config = on(config, config.data.model_copy(update=changes))
    _, loader = opened(config)
    assert loader.steps_per_epoch == 7
    for epoch in range(4):
        for [(images, targets)] in loader.epoch(epoch):
            assert (targets.labelled, len(images.pixels)) == (2, 4)
    others = stores(config)[1].folder.name
    shown = [(number, index, view) for name, index, number, view in read if name == others]
    assert len(shown) == 4 * 14
    whole = [(number, index) for number, index, _ in shown if number < 6]
    assert sorted(whole) == [(number, index) for number in range(6) for index in range(9)]
    for first in (0, 3):
        views = sorted((i, view) for number, i, view in shown if first <= number < first + 3)
        assert views == [(index, view) for index in range(9) for view in range(3)]


def test_a_resumed_run_ends_as_an_undisturbed_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = placed(mixed(make_config(), precision="float16"), tmp_path)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("summary.json", "weights.safetensors"):
        (tmp_path / "again" / name).unlink()
    shutil.rmtree(max((tmp_path / "again" / "checkpoints").iterdir()))
    gone = shards(tmp_path)[-1]
    content = gone.read_bytes()
    gone.unlink()
    train(config, tmp_path / "again")
    assert gone.read_bytes() == content
    assert_same_run(tmp_path / "again", tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_store_and_learn_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    base = mixed(make_config(detector={"dropout": 0.0}), method={}, count=3)
    alone, together = placed(base, tmp_path / "one"), placed(base, tmp_path / "two")
    train(alone, tmp_path / "alone")
    train_with_two_workers(together, tmp_path / "together")
    ours, theirs = shards(tmp_path / "one"), shards(tmp_path / "two")
    assert len(ours) == 6
    assert_stored_the_same(ours, theirs)
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "together"), rel=1e-5)


@pytest.fixture
def beside_a_folder(make_config: MakeConfig, tmp_path: Path) -> Config:
    """24 images with labels, and a folder of six."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.effect_noise((32, 32), 20 * number + 5).convert("RGB").save(folder / f"{number}.png")
    config = placed(with_views(make_config()), tmp_path)
    unlabelled = UnlabelledConfig(images=folder)
    return on(config, config.data.model_copy(update={"unlabelled": unlabelled}))


def test_a_folder_that_changed_makes_a_store_of_its_own_alone(
    beside_a_folder: Config, tmp_path: Path
) -> None:
    train(beside_a_folder, tmp_path / "run")
    before = [store.folder for store in stores(beside_a_folder)]
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "3.png")
    after = [store.folder for store in stores(beside_a_folder)]
    assert before[0] == after[0] and before[1] != after[1]
    missing = [store.forecast().missing for store in stores(beside_a_folder)]
    assert missing[0] == 0 < missing[1]


def test_images_behind_a_url_have_the_store_of_those_in_a_folder(
    beside_a_folder: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    names = [f"{number}.png" for number in range(6)]
    images = [
        {"id": i, "file_name": name, "width": 32, "height": 32} for i, name in enumerate(names)
    ]
    listed = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "photos.json").write_text(json.dumps(listed))
    with over_http(tmp_path) as (root, _):
        places = [
            {"images": f"{base}/photos", "annotations": f"{base}/photos.json"}
            for base in (tmp_path, root)
        ]
        here, there = (
            on(
                beside_a_folder,
                beside_a_folder.data.model_copy(
                    update={"unlabelled": UnlabelledConfig.model_validate(place)}
                ),
            )
            for place in places
        )
        [_, others] = describe_json(there)["views"]
        assert others["folder"] is None and others["missing"] == others["bytes"]
        assert "unless it was before: the images are not here" in describe(there)
        train(here, tmp_path / "here")
        train(there, tmp_path / "there")
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    assert len({path.parent for path in shards(tmp_path)}) == 2


def test_a_share_of_labels_changes_only_what_it_decides(
    beside_a_folder: Config, make_config: MakeConfig, tmp_path: Path
) -> None:
    half = on(beside_a_folder, beside_a_folder.data.model_copy(update={"labelled_share": 0.5}))
    whole, part = stores(beside_a_folder), stores(half)
    assert whole[0].folder != part[0].folder and whole[1].folder == part[1].folder
    rest = placed(mixed(make_config()), tmp_path)
    other = on(rest, rest.data.model_copy(update={"labelled_share": 0.75}))
    for one, two in zip(stores(rest), stores(other), strict=True):
        assert one.folder != two.folder


def test_scenes_of_another_seed_are_stored(make_config: MakeConfig, tmp_path: Path) -> None:
    config = placed(with_views(make_config(optimisation={"epochs": 1})), tmp_path)
    scenes = config.data.digit_scenes
    assert scenes is not None
    other: DigitScenesConfig = scenes.model_copy(update={"seed": 1, "train_images": 6})
    unlabelled = UnlabelledConfig(digit_scenes=other, share=0.25)
    config = on(config, config.data.model_copy(update={"unlabelled": unlabelled}))
    train(config, tmp_path / "run")
    assert [len(store.split.records) for store in stores(config)] == [24, 6]
    assert [store.forecast().missing for store in stores(config)] == [0, 0]


def test_both_stores_together_are_forecast_and_limited(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = placed(mixed(make_config(), method={}, count=4, unlabelled_count=1), tmp_path)
    one, other = (store.forecast().total for store in stores(config))
    assert other < one / 3
    views = config.teacher.views
    for limit, fits in ((one + other + 1, True), (one + other - 1, False)):
        limited = views.model_copy(update={"maximum_gigabytes": limit / 1e9})
        teacher = config.teacher.model_copy(update={"views": limited})
        asked = config.model_copy(update={"teacher": teacher})
        if fits:
            assert forecast_views(asked)
            continue
        for judge in (lambda asked: train(asked, tmp_path / "run"), describe):
            with pytest.raises(UserError) as raised:
                judge(asked)
            text = str(raised.value)
            assert "4 views of 12 images and 1 view of 12 images without labels take" in text
            assert "count below 4" in text and "unlabelled_count" not in text
    assert not (tmp_path / "teacher-views").exists()
    train(config, tmp_path / "run")
    taken = sum(path.stat().st_size for path in shards(tmp_path))
    assert taken == pytest.approx(one + other, rel=0.05)


def test_a_dry_run_says_how_large_stores_are_and_whether_they_are_there(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = placed(mixed(make_config(), count=2, unlabelled_count=1), tmp_path)
    labelled, others = describe_json(config)["views"]
    assert (labelled["views"], others["views"], others["images"]) == (2, 1, 12)
    assert labelled["missing"] == labelled["bytes"] > others["bytes"] == others["missing"]
    text = describe(config)
    assert "views        2 of 12 images, 0.0 MB, 0.0 MB of it to be stored in " in text
    assert "views        1 of 12 images without labels" in text
    assert not (tmp_path / "teacher-views").exists()
    train(config, tmp_path / "run")
    labelled, others = describe_json(config)["views"]
    assert labelled["missing"] == others["missing"] == 0
    assert f"0.0 MB, stored in {labelled['folder']}" in describe(config)
    assert {labelled["folder"], others["folder"]} == {str(p.parent) for p in shards(tmp_path)}
    scenes = config.data.digit_scenes.model_copy(update={"seed": 9})
    unwritten = on(config, config.data.model_copy(update={"digit_scenes": scenes}))
    assert describe_json(unwritten)["views"] is None
    assert "digit scenes that are not written yet" in describe(unwritten)
    assert describe_json(make_config())["views"] == ()


def test_views_that_a_run_does_not_read_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    warnings = describe_json(placed(mixed(make_config(), count=2), tmp_path))["warnings"]
    assert not warnings  # two epochs, which show each image twice
    config = placed(mixed(make_config(), count=3, unlabelled_count=4), tmp_path)
    one, other = describe_json(config)["warnings"]
    assert "views.count is 3" in one and "each image with labels 2 times" in one
    assert "unlabelled_count is 4" in other and "2 would do" in other


def test_a_count_of_images_that_are_not_there_is_refused(make_config: MakeConfig) -> None:
    tree = with_views(make_config()).model_dump(mode="json")
    tree["teacher"]["views"]["unlabelled_count"] = 2
    for unlabelled in (None, {"rest_of_train": True, "labels": "labels.json"}):
        tree["data"] |= {"labelled_share": 0.5, "unlabelled": unlabelled}
        with pytest.raises(ValueError, match=r"unlabelled_count has no effect: data\.unlabelled"):
            Config.model_validate_json(json.dumps(tree))


def scheduled(config: Config) -> Config:
    method = config.distillation.model_copy(update={"every_steps": 3})
    return config.model_copy(update={"distillation": method})


@pytest.fixture
def read_epochs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An epoch for each record that is read."""
    found: list[int] = []
    real = TeacherViews.record

    def watched(views: TeacherViews, index: int, epoch: int) -> Any:
        found.append(epoch)
        return real(views, index, epoch)

    monkeypatch.setattr(TeacherViews, "record", watched)
    yield found


def test_steps_that_do_not_distil_read_no_store_and_no_image_without_labels(
    make_config: MakeConfig, tmp_path: Path, read_epochs: list[int]
) -> None:
    config = placed(scheduled(mixed(make_config())), tmp_path)
    train(config, tmp_path / "run")
    assert read_epochs == [0] * 8 + [1] * 8, "steps 0, 3, 6 and 9, four images each"
    _, loader = opened(config)
    for start in (0, 2):
        batches = [images for [(images, _)] in loader.epoch(1, start)]
        shown = [(len(images.pixels), images.stored is not None) for images in batches]
        assert shown == ([(4, True), (2, False), (2, False)] * 2)[start:]


def test_steps_are_measured_on_the_batches_that_they_get(
    make_config: MakeConfig, tmp_path: Path, read_epochs: list[int]
) -> None:
    maker = StepMaker(placed(scheduled(mixed(make_config())), tmp_path), CONTEXT, steps=100)
    maker.cost(2, start=7)
    assert read_epochs == []
    maker.cost(1, start=9)
    assert read_epochs == [1] * 4
    maker.close()


def test_shards_hold_the_same_images_with_more_views(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3etr.engine.view_store.SHARD_BYTES", 100_000)
    config = make_config()
    sizes = config.data.augmentation.model_copy(update={"crop": 0.7, "shortest_sides": (32, 96)})
    config = on(config, config.data.model_copy(update={"augmentation": sizes}))
    forecasts = [
        stores(placed(mixed(config, method={}, count=count), tmp_path))[0].forecast()
        for count in (1, 2, 9)
    ]
    assert len({forecast.shard_images for forecast in forecasts}) == 1
    assert len(forecasts[0].shards) > 1
    assert forecasts[2].shards[: len(forecasts[0].shards)] == forecasts[0].shards
