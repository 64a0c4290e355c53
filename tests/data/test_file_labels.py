"""Images without labels of their own that a COCO file labels: training images like the others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from coco_files import annotation, picture

from d3etr.config.data import DataConfig, PreprocessingConfig, SplitConfig
from d3etr.config.location import Url
from d3etr.data.checks import check_data
from d3etr.data.dataset import DetectionDataset
from d3etr.data.loading import EpochLoader
from d3etr.data.splits import DetectionSplit, open_split, read_split
from d3etr.errors import UserError

PIXELS = PreprocessingConfig(shortest_side=24, longest_side=48)
NAMES = ["0.png", "below/1.png", "below/2.png", "3.png", "below/4.png"]


@pytest.fixture
def train(write_split: Any) -> SplitConfig:
    boxes = [annotation(n, n, n % 2 * 7, [4, 4, 16, 12]) for n in range(1, 9)]
    config: SplitConfig = write_split([(40, 30), (30, 40)] * 4, boxes)
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "loose"
    (place / "below").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(30 + number, 44 - number, 500 + number).save(place / name)
    return place


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Two boxes on each image but the fourth, which has none; other class ids, names in order."""
    return write(tmp_path / "labels.json")


def write(file: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> Path:
    sizes = [(30 + n, 44 - n) for n in range(len(NAMES))]
    images = [
        {"id": 100 + n, "file_name": name, "width": w, "height": h}
        for n, (name, (w, h)) in enumerate(zip(NAMES, sizes, strict=True))
    ]
    boxed = [n for n in range(len(NAMES)) if n != 3]
    content = {
        "images": images,
        "annotations": [
            annotation(k, 100 + n, 11 + k % 3, [2 + k, 3, 9, 8], score=0.5)
            for k, n in enumerate([*boxed, *boxed])
        ],
        "categories": [
            {"id": 11 + k, "name": name} for k, name in enumerate(("cat", "dog", "cup"))
        ],
    }
    change(content)
    file.write_text(json.dumps(content))
    return file


def data_of(train: SplitConfig, unlabelled: dict[str, Any], **changes: Any) -> DataConfig:
    settings = {"train": train, "validation": train, "workers": 0, "preprocessing": PIXELS}
    return DataConfig(**(settings | {"unlabelled": unlabelled} | changes))


def assert_same_samples(left: DetectionSplit, right: DetectionSplit) -> None:
    """Pixels and boxes, image by image."""
    assert len(left.records) == len(right.records)
    datasets = [DetectionDataset(split, PIXELS) for split in (left, right)]
    for index in range(len(left.records)):
        ours, theirs = (dataset.sample(index, epoch=0) for dataset in datasets)
        assert (ours.pixels == theirs.pixels).all()
        assert np.array_equal(ours.labels, theirs.labels)
        assert np.array_equal(ours.boxes_cxcywh, theirs.boxes_cxcywh)
        assert ours.labelled


def test_a_folders_images_join_those_with_labels(
    train: SplitConfig, folder: Path, labels: Path
) -> None:
    split = open_split(data_of(train, {"images": folder, "labels": labels}), "train")
    assert split.unlabelled is None and len(split.records) == 13
    own, others = split.parts
    assert_same_samples(own, read_split("train", train))
    alone = read_split("train", SplitConfig(images=folder, annotations=labels))
    by_name = {record.file_name: record for record in alone.records}
    order = tuple(by_name[record.file_name] for record in others.records)
    assert sorted(by_name) == sorted(NAMES) and sum(len(r.labels) for r in order) == 8
    assert_same_samples(others, replace(alone, records=order))
    joined = DetectionDataset(split, PIXELS)
    theirs = DetectionDataset(others, PIXELS)
    assert (joined.sample(8, 0).pixels == theirs.sample(0, 0).pixels).all()
    assert joined.split.images.shown(split.records[8].file_name) == f"{folder}/0.png"


def test_true_labels_of_the_rest_make_all_labelled(train: SplitConfig) -> None:
    assert isinstance(train.annotations, Path)
    unlabelled = {"rest_of_train": True, "labels": train.annotations}
    split = open_split(data_of(train, unlabelled, labelled_share=0.5), "train")
    whole = read_split("train", train)
    assert len(split.parts[0].records) == len(split.parts[1].records) == 4
    ours = {record.id: record for record in split.records}
    assert list(ours) != [record.id for record in whole.records] and len(ours) == 8
    records = tuple(ours[record.id] for record in whole.records)
    assert_same_samples(replace(split, records=records), whole)


def test_an_epoch_is_one_pass_over_all(train: SplitConfig, folder: Path, labels: Path) -> None:
    data = data_of(train, {"images": folder, "labels": labels}, bucket_by_aspect=False)
    split = open_split(data, "train")
    loader = EpochLoader(split, data, batch_size=4, parts=1, rank=0, world_size=1, seed=1)
    assert loader.steps_per_epoch == 3
    seen: list[tuple[int, ...]] = []
    for [(images, targets)] in loader.epoch(0):
        assert targets.labelled is None
        seen += [tuple(pixels.flatten()[:50].tolist()) for pixels in images.pixels]
    assert len(set(seen)) == 12, "no image comes twice"


def test_images_on_one_side_only_are_left_out_with_a_count(
    train: SplitConfig, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def move(content: dict[str, Any]) -> None:
        content["images"][0]["file_name"] = "elsewhere.png"

    labels = write(tmp_path / "moved.json", move)
    data = data_of(train, {"images": folder, "labels": labels})
    split = open_split(data, "train")
    assert len(split.records) == 12
    assert [r.file_name for r in split.parts[1].left_out] == ["0.png"]
    texts = [
        "1 of 5 images are not among those without labels and are left out",
        "1 of 5 images without labels are not in it and are left out",
    ]
    assert all(f"{labels}: {text}" in caplog.text for text in texts)
    report = next(r for r in check_data(data).splits if r.name == "labels of a file")
    assert {*texts} <= {*report.warnings}


def test_checks_count_a_files_boxes(train: SplitConfig, folder: Path, labels: Path) -> None:
    report = check_data(data_of(train, {"images": folder, "labels": labels}))
    assert report.ok
    facts = {split.name: split.facts for split in report.splits}
    assert facts["labels of a file"]["boxes_per_category"] == {"cat": 3, "dog": 3, "cup": 2}
    assert facts["labels of a file"]["annotations"] == str(labels)
    assert "boxes" not in facts["unlabelled"] and facts["train"]["boxes"] == 8


def _swap(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "dog"
    content["categories"][1]["name"] = "cat"


def _above(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["file_name"] = f"loose/{image['file_name']}"


def _twice(content: dict[str, Any]) -> None:
    content["images"].append(content["images"][2] | {"id": 7})


def _grow(content: dict[str, Any]) -> None:
    content["images"][2]["width"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, "has the classes dog, cat, cup, the training annotations cat, dog, cup"),
        (_above, r"none of its 5 images \(such as 'loose/0\.png'\) is one of the 5 without labels"),
        (_grow, r"below/2\.png has 33 x 42 pixels there, the image 32 x 42"),
        (_twice, r"lists images more than once: below/2\.png\. Expected each once"),
        (lambda content: content.pop("annotations"), "missing key annotations"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None],
    message: str,
    train: SplitConfig,
    folder: Path,
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "odd.json", change)
    data = data_of(train, {"images": folder, "labels": file})
    with pytest.raises(UserError, match=rf"^data\.unlabelled\.labels.*{message}"):
        open_split(data, "train")
    report = check_data(data)
    errors = [text for split in report.splits for text in split.errors]
    assert not report.ok and any(text.startswith("data.unlabelled.labels") for text in errors)


def test_classes_are_shown_from_where_they_differ(write_split: Any, tmp_path: Path) -> None:
    places = []
    for change in ("tram", "bus"):
        names = ["car", "cat", "cup", "dog", "key", "man", "pen", change, "zoo"]
        numbered = [{"id": k, "name": name} for k, name in enumerate(names)]
        split = write_split([(40, 30)] * 2, [annotation(1, 1, 0, [4, 4, 16, 12])])
        content = json.loads(split.annotations.read_text()) | {"categories": numbered}
        places.append(tmp_path / f"{change}.json")
        places[-1].write_text(json.dumps(content))
    train = split.model_copy(update={"annotations": places[0]})
    data = data_of(train, {"images": split.images, "labels": places[1]})
    with pytest.raises(UserError, match=r"classes \.\.\., bus, zoo, the .* \.\.\., tram, zoo\. Ex"):
        open_split(data, "train")


def test_labels_of_no_image_are_refused(train: SplitConfig) -> None:
    unlabelled = {"rest_of_train": True, "labels": train.annotations}
    data = data_of(train, unlabelled, labelled_share=0.99)  # which rounds to all eight
    with pytest.raises(UserError, match=r"^data\.unlabelled\.labels.*no image without labels"):
        open_split(data, "train")
    assert not check_data(data).ok


def test_a_missing_file_is_named(train: SplitConfig, folder: Path) -> None:
    data = data_of(train, {"images": folder, "labels": folder / "none.json"})
    with pytest.raises(UserError, match=r"^data\.unlabelled\.labels: .*none\.json cannot be read"):
        open_split(data, "train")


def test_a_share_beside_labels_is_refused(train: SplitConfig, folder: Path, labels: Path) -> None:
    with pytest.raises(ValueError, match="share has no effect beside labels"):
        data_of(train, {"images": folder, "labels": labels, "share": 0.25})


def test_images_and_labels_may_be_at_urls(
    train: SplitConfig,
    folder: Path,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    here = open_split(data_of(train, {"images": folder, "labels": labels}), "train")
    files = fsspec.filesystem("memory")
    for name in NAMES:
        files.pipe(f"/loose/{name}", (folder / name).read_bytes())
    files.pipe("/labels.json", labels.read_bytes())
    place = Url("memory://labels.json")
    unlabelled = {"images": Url("memory://loose"), "annotations": place, "labels": place}
    data = data_of(train, unlabelled)
    there = open_split(data, "train")
    names = sorted(record.file_name for record in here.records)
    assert names == sorted(record.file_name for record in there.records)
    order = {record.file_name: record for record in there.records}
    records = tuple(order[record.file_name] for record in here.records)
    assert_same_samples(here, replace(there, records=records))
    looked_up = open_split(data, "train", fetch=False)
    assert all(looked_up.images.size(record.file_name) for record in looked_up.records)
    files.store.clear()
