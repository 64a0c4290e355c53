"""What ``d3etr init`` finds of a data set, in any format, and how it divides one without splits."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from format_writers import WRITERS

from d3etr.config.data import DigitScenesConfig, SplitConfig
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.splits import read_split
from d3etr.errors import UserError
from d3etr.progress import no_progress
from d3etr.project.locate import WHOLE, locate
from d3etr.project.splitting import FEWEST_IMAGES, coco_tree, divide
from d3etr.project.survey import Survey, survey

SCENES = {"train_images": 30, "validation_images": 6, "test_images": 4, "image_size": 32}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, SplitConfig]:
    root = tmp_path_factory.mktemp("scenes")
    config = DigitScenesConfig(root=root, minimum_scale=8, maximum_scale=16, **SCENES)
    return write_digit_scenes(config)


def look(place: Path, images: Path | None = None) -> Survey:
    return survey(place, images, no_progress)


def counts(found: Survey) -> dict[str, int]:
    return {name: len(split.records) for name, split in found.splits.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_with_splits_keeps_them(
    name: str, scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS[name](scenes, tmp_path / "data")
    found = look(tmp_path / "data")
    assert counts(found) == {"train": 30, "validation": 6, "test": 4}
    assert not found.made
    assert found.statistics.images == 30


def test_a_folder_of_coco_files_is_read_by_their_names(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    (tmp_path / "annotations").mkdir()
    for name, folder in (("train", "train"), ("validation", "val")):
        split = scenes[name]
        assert isinstance(split.images, Path) and isinstance(split.annotations, Path)
        shutil.copytree(split.images, tmp_path / folder)
        shutil.copy(split.annotations, tmp_path / "annotations" / f"instances_{folder}2026.json")
    found = look(tmp_path)
    assert counts(found) == {"train": 30, "validation": 6}
    assert found.places["train"]["images"] == str(tmp_path / "train")


def test_one_coco_file_is_divided_by_lists(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    split = scenes["train"]
    assert isinstance(split.images, Path) and isinstance(split.annotations, Path)
    shutil.copytree(split.images, tmp_path / "photos")
    shutil.copy(split.annotations, tmp_path / "labels.json")
    with pytest.raises(UserError, match="--images FOLDER"):
        look(tmp_path / "labels.json")
    found = look(tmp_path / "labels.json", tmp_path / "photos")
    assert sum(counts(found).values()) == 30 and {*found.made} == {"train", "validation", "test"}
    trees = found.data_tree(tmp_path)
    for name, tree in found.made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
        again = read_split(name, SplitConfig.model_validate_json(json.dumps(trees[name])))
        assert [r.file_name for r in again.records] == [
            r.file_name for r in found.splits[name].records
        ]
        assert len(again.objects.labels) == len(found.splits[name].objects.labels)
        assert again.categories == found.splits[name].categories


@pytest.mark.parametrize("spelling", ["{}", "./{}", "{root}/{}", ["{}"]])
def test_yolo_whose_validation_is_its_training_is_divided(
    spelling: str | list[str], scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["yolo"](scenes, tmp_path / "data")
    file = tmp_path / "data" / "data.yaml"
    tree = yaml.safe_load(file.read_text())
    text = json.dumps(spelling).format(tree["train"], root=tmp_path / "data")
    file.write_text(yaml.safe_dump(tree | {"val": json.loads(text), "test": None}))
    found = look(tmp_path / "data")
    assert sum(counts(found).values()) == 30 and set(found.made) == {*counts(found)}


def test_pascal_voc_without_lists_is_divided(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["voc"](scenes, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "ImageSets")
    found = look(tmp_path / "data")
    assert sum(counts(found).values()) == 40 and found.made


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ((), "is not there; expected a COCO file"),
        (("notes.txt",), "in no format that is known"),
        (("images/a.jpg", "labels/a.txt"), "no data.yaml, which names the classes"),
    ],
)
def test_what_is_no_data_set_is_named(layout: tuple[str, ...], text: str, tmp_path: Path) -> None:
    for name in layout:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    with pytest.raises(UserError, match=text):
        locate(tmp_path / "data")


def test_several_files_of_one_split_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("train_a.json", "train_b.json"):
        (tmp_path / name).write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="several COCO files of the train split"):
        locate(tmp_path)


def test_a_division_holds_each_image_once_and_each_class_everywhere(
    scenes: Mapping[str, SplitConfig],
) -> None:
    whole = read_split(WHOLE, scenes["train"])
    parts = divide(whole.records)
    names = [record.file_name for part in parts.values() for record in part]
    assert sorted(names) == sorted(record.file_name for record in whole.records)
    assert {len(parts["validation"]), len(parts["test"])} <= {3, 4, 5, 6}
    # The order in which images come decides nothing.
    assert {r.id for r in divide(whole.records[::-1])["test"]} == {r.id for r in parts["test"]}
    images = {label: sum(label in r.labels for r in whole.records) for label in range(10)}
    for label, count in images.items():
        if count >= 8:
            assert all(any(label in r.labels for r in part) for part in parts.values()), label


def test_too_few_images_are_not_divided(scenes: Mapping[str, SplitConfig]) -> None:
    whole = read_split(WHOLE, scenes["train"])
    with pytest.raises(UserError, match=f"at least {FEWEST_IMAGES}"):
        divide(whole.records[:4])
    assert len(coco_tree(whole, whole.records[:4])["images"]) == 4
