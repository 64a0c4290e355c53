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
from d3etr.project.locate import locate
from d3etr.project.names import BOTH, split_of
from d3etr.project.splitting import FEWEST_IMAGES, coco_tree, divide
from d3etr.project.survey import Survey, survey

SCENES = {"train_images": 30, "validation_images": 6, "test_images": 4, "image_size": 32}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, SplitConfig]:
    root = tmp_path_factory.mktemp("scenes")
    config = DigitScenesConfig(root=root, minimum_scale=8, maximum_scale=16, **SCENES)
    return write_digit_scenes(config)


def look(place: Path, images: Path | None = None, **more: bool) -> Survey:
    return survey(place, images, no_progress, **more)


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


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b" \r\n"])
def test_a_coco_file_of_a_folder_may_begin_with_a_mark_or_space(
    scenes: Mapping[str, SplitConfig], tmp_path: Path, before: bytes
) -> None:
    split = scenes["train"]
    assert isinstance(split.images, Path) and isinstance(split.annotations, Path)
    shutil.copytree(split.images, tmp_path / "images")
    (tmp_path / "labels.json").write_bytes(before + split.annotations.read_bytes())
    assert sum(counts(look(tmp_path)).values()) == 30


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


@pytest.mark.parametrize("name", WRITERS)
def test_a_test_split_without_validation_is_kept_and_train_divided(
    name: str, scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS[name]({"train": scenes["train"], "test": scenes["test"]}, tmp_path)
    found = look(tmp_path)
    assert counts(found) == {"train": 25, "validation": 5, "test": 4}
    assert {*found.made} == {"train", "validation"} and found.part == "train"
    assert found.places["test"] == {"annotations": str(tmp_path), "subset": "test"}


def test_pascal_voc_with_trainval_and_lists_of_classes(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["voc"]({"train": scenes["train"], "test": scenes["test"]}, tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    for name in ("trainval", "test"):
        lines = (lists / f"{name}.txt").read_text().splitlines()
        (lists / f"cat_{name}.txt").write_text("".join(f"{line} -1\n" for line in lines))
    for place in (tmp_path, tmp_path / "Annotations"):
        found = look(place)
        assert counts(found) == {"train": 25, "validation": 5, "test": 4}
        assert found.part == "trainval" and not found.warnings
    for name in ("train", "val"):
        shutil.copy(lists / "trainval.txt", lists / f"{name}.txt")
    found = look(tmp_path)
    assert counts(found) == {"train": 30, "validation": 30, "test": 4} and not found.warnings


def test_parts_whose_names_say_nothing_are_not_guessed_among(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["imagefolder"]({"train": scenes["train"], "test": scenes["test"]}, tmp_path)
    for old, new in (("train", "v0"), ("test", "v1")):
        (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(UserError, match=r"found the folders v0, v1; .*'train'.*rename"):
        look(tmp_path)
    shutil.rmtree(tmp_path / "v1")
    found = look(tmp_path)
    assert sum(counts(found).values()) == 30 and len(found.made) == 3 and found.part is None


def test_parts_that_are_not_used_are_named(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["imagefolder"](scenes, tmp_path)
    (tmp_path / "test").rename(tmp_path / "more")
    [warning] = look(tmp_path).warnings
    assert "not used: more" in warning and "train (train)" in warning


def coco_files(scenes: Mapping[str, SplitConfig], folder: Path, **files: str) -> None:
    """Splits of the scenes as COCO files of other names, all images in one folder."""
    for name, file in files.items():
        split = scenes[name]
        assert isinstance(split.images, Path) and isinstance(split.annotations, Path)
        content = json.loads(split.annotations.read_text())
        for image in content["images"]:
            old, image["file_name"] = image["file_name"], f"{name}-{image['file_name']}"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            shutil.copy(split.images / old, folder / "images" / image["file_name"])
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content))


def test_coco_files_of_train_and_test_leave_validation_to_be_made(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path, train="train.json", test="test.json")
    found = look(tmp_path)
    assert counts(found) == {"train": 25, "validation": 5, "test": 4}
    assert {*found.made} == {"train", "validation"} and found.part == "train.json"


@pytest.mark.parametrize("folder", ["test-data", "training", "val"])
def test_the_name_of_the_data_set_itself_says_nothing(
    folder: str, scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path / folder, train="train.json", validation="val.json")
    assert counts(look(tmp_path / folder)) == {"train": 30, "validation": 6}


def test_cocos_own_layout(scenes: Mapping[str, SplitConfig], tmp_path: Path) -> None:
    files = {"train": "train2017", "validation": "val2017"}
    coco_files(scenes, tmp_path, **{n: f"annotations/instances_{f}.json" for n, f in files.items()})
    for file in files.values():
        text = (tmp_path / "annotations" / f"instances_{file}.json").read_text()
        (tmp_path / "annotations" / f"person_keypoints_{file}.json").write_text(text)
        captions = {"images": [], "annotations": [], "licenses": []}
        (tmp_path / "annotations" / f"captions_{file}.json").write_text(json.dumps(captions))
    found = look(tmp_path)
    assert counts(found) == {"train": 30, "validation": 6}
    [warning] = found.warnings
    assert "person_keypoints_train2017.json" in warning and "captions" not in warning


@pytest.mark.parametrize("name", ["train_val.json", "trainval2017.json", "val/train.json"])
def test_one_coco_file_is_never_both_splits(
    name: str, scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path, train=name, test="test.json")
    found = look(tmp_path)
    assert counts(found) == {"train": 25, "validation": 5, "test": 4} and found.part == name


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("instances_train2017", "train"),
        ("Valid", "validation"),
        ("test-hard", "test"),
        ("trainval", BOTH),
        ("train_val", BOTH),
        ("test_dev", None),
        ("contest", None),
    ],
)
def test_words_of_a_name_say_which_split_it_is(text: str, split: str | None) -> None:
    assert split_of(text) == split


def test_pascal_voc_may_have_its_images_elsewhere(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["voc"](scenes, tmp_path / "data")
    (tmp_path / "data" / "JPEGImages").rename(tmp_path / "photos")
    with pytest.raises(UserError, match=r"^DATA .* are not in .*JPEGImages.*correct --images"):
        look(tmp_path / "data")
    found = look(tmp_path / "data", tmp_path / "photos")
    assert counts(found) == {"train": 30, "validation": 6, "test": 4}
    assert found.places["test"]["images"] == str(tmp_path / "photos")


@pytest.mark.parametrize("name", ["yolo", "imagefolder"])
def test_formats_that_say_where_their_images_are_need_no_other_word(
    name: str, scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS[name](scenes, tmp_path / "data")
    with pytest.raises(UserError, match=r"--images .*another format \(.*\): remove it"):
        look(tmp_path / "data", tmp_path)
    picture = next((tmp_path / "data").rglob("*.png"))
    picture.write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        look(tmp_path / "data")
    assert str(caught.value).startswith("DATA: ") and "data.train" not in str(caught.value)


@pytest.mark.parametrize("names", [("train",), ("train", "validation")])
def test_links_out_of_the_folder_are_followed_where_that_is_asked_for(
    names: tuple[str, ...], scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    WRITERS["yolo"]({name: scenes[name] for name in names}, tmp_path / "data")
    picture = next((tmp_path / "data" / "images" / "train").iterdir())
    picture.rename(tmp_path / picture.name)
    picture.symlink_to(tmp_path / picture.name)
    with pytest.raises(UserError, match="init: --follow-links"):
        look(tmp_path / "data")
    found = look(tmp_path / "data", follow_links=True)
    assert len(found.splits) == 2 + (len(names) == 1)
    assert all(place["follow_links"] is True for place in found.data_tree(tmp_path).values())


def without_objects(file: Path, but: int = 0) -> None:
    """Take all objects from a COCO file, but for those of so many images."""
    content = json.loads(file.read_text())
    kept = {image["id"] for image in content["images"][:but]}
    objects = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    file.write_text(json.dumps(content | {"annotations": objects}))


def test_a_validation_split_without_objects_is_refused(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path, train="train.json", validation="val.json")
    without_objects(tmp_path / "val.json")
    with pytest.raises(UserError, match=r"val\.json: no image of validation .* divides the train"):
        look(tmp_path)
    (tmp_path / "val.json").unlink()
    without_objects(tmp_path / "train.json", but=1)
    with pytest.raises(UserError, match=r"train\.json: found one image .* annotate more"):
        look(tmp_path)
    without_objects(tmp_path / "train.json")
    with pytest.raises(UserError, match="nothing to learn from"):
        look(tmp_path)


def test_a_few_images_with_objects_are_learnt_from_and_measured_on(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path, train="train.json")
    without_objects(tmp_path / "train.json", but=3)
    found = look(tmp_path)
    assert all(len(split.objects.labels) for split in found.splits.values()) and not found.warnings


def test_a_test_split_without_objects_is_a_warning_that_is_shown(
    scenes: Mapping[str, SplitConfig], tmp_path: Path
) -> None:
    coco_files(scenes, tmp_path, train="train.json", validation="val.json", test="test.json")
    without_objects(tmp_path / "test.json")
    lines: list[str] = []
    found = survey(tmp_path, None, lambda text, *_: lines.append(text))
    assert found.warnings == ("no image of test has an object: there is nothing to measure",)
    assert f"warning: {found.warnings[0]}" in lines


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ((), "is not there; expected a COCO file"),
        (("notes.txt",), "in no format that is known: .* name the file or folder that has them"),
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
    whole = read_split("train", scenes["train"])
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
    whole = read_split("train", scenes["train"])
    with pytest.raises(UserError, match=f"at least {FEWEST_IMAGES}"):
        divide(whole.records[:4])
    assert len(coco_tree(whole, whole.records[:4])["images"]) == 4
