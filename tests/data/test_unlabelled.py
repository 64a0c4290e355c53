"""Images without labels: where they come from, and which batches they get into."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import annotation, picture

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig, SplitConfig
from d3etr.data.checks import check_data
from d3etr.data.loading import EpochLoader
from d3etr.data.sampling import add_unlabelled, epoch_batches, unlabelled_passes
from d3etr.data.splits import open_split
from d3etr.errors import UserError

SIZES = [(40, 30), (30, 40), (36, 36), (48, 30), (30, 44)] * 4


@pytest.fixture
def train(write_split: Any) -> SplitConfig:
    boxes = [annotation(n, n, n % 2 * 7, [4, 4, 16, 12]) for n in range(1, 21)]
    config: SplitConfig = write_split(SIZES, boxes)
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirteen images of other sizes, some in a folder below."""
    place = tmp_path / "loose"
    (place / "below").mkdir(parents=True)
    for number in range(13):
        name = f"below/{number}.png" if number % 3 else f"{number}.png"
        picture(30 + number, 44 - number, 500 + number).save(place / name)
    (place / "notes.txt").write_text("no image")
    return place


def data_of(train: SplitConfig, unlabelled: dict[str, Any], **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "train": train,
        "validation": train,
        "workers": 0,
        "unlabelled": unlabelled,
        "preprocessing": PreprocessingConfig(shortest_side=24, longest_side=48),
        "augmentation": AugmentationConfig(crop=0.3, shortest_sides=(20, 24)),
    }
    return DataConfig(**(settings | changes))


def loader_of(data: DataConfig, rank: int = 0, world_size: int = 1, parts: int = 1) -> EpochLoader:
    shared = {"batch_size": 8, "seed": 5}
    split = open_split(data, "train")
    return EpochLoader(split, data, parts=parts, rank=rank, world_size=world_size, **shared)


def shown(steps: Any) -> list[list[tuple[Any, ...]]]:
    """What each step shows: whether it has labels, image id, its pixels' sum and its objects."""
    found = []
    for step in steps:
        rows = []
        for images, targets in step:
            assert targets.labelled is not None
            for row, number in enumerate(targets.image_ids):
                labelled = row < targets.labelled
                assert labelled or targets.counts[row] == 0
                pixels = float(images.pixels[row].double().sum())
                rows.append((labelled, number, pixels, targets.counts[row]))
        found.append(sorted(rows))
    return found


def test_a_folder_gives_every_image_below_it(train: SplitConfig, folder: Path) -> None:
    found = open_split(data_of(train, {"images": folder}), "train").unlabelled
    assert found is not None and len(found.records) == 13
    sizes = {record.file_name: (record.width, record.height) for record in found.records}
    assert sizes["0.png"] == (30, 44) and sizes["below/10.png"] == (40, 34)
    assert not len(found.objects.labels)


def test_a_list_narrows_it_and_its_boxes_are_not_read(
    train: SplitConfig, folder: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "listed.json"
    image = {"id": 9, "file_name": "below/1.png", "width": 31, "height": 43}
    contents = [{"images": [image]}, {"images": [image], "annotations": [{"bbox": "nonsense"}]}]
    for content in contents:
        listed.write_text(json.dumps(content))
        data = data_of(train, {"images": folder, "annotations": listed})
        found = open_split(data, "train").unlabelled
        assert found is not None
        assert [record.file_name for record in found.records] == ["below/1.png"]
    listed.write_text(json.dumps({"images": [{**image, "file_name": "gone.png"}]}))
    with pytest.raises(UserError, match=r"data\.unlabelled\.annotations.*gone\.png"):
        open_split(data_of(train, {"images": folder, "annotations": listed}), "train")


def test_what_is_wrong_with_a_folder_is_named(train: SplitConfig, folder: Path) -> None:
    (folder / "below" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"(?s)^data\.unlabelled\.images: .*broken\.png: cannot be decoded"
    ):
        open_split(data_of(train, {"images": folder}), "train")
    with pytest.raises(UserError, match=r"data\.unlabelled\.images: .*nowhere is not a folder"):
        open_split(data_of(train, {"images": folder / "nowhere"}), "train")
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_split(data_of(train, {"images": folder}), "train")


def test_links_that_lead_out_need_a_word(train: SplitConfig, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    picture(30, 30, 7).save(outside)
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(UserError, match="links lead out"):
        open_split(data_of(train, {"images": folder}), "train")
    found = open_split(data_of(train, {"images": folder, "follow_links": True}), "train").unlabelled
    assert found is not None and len(found.records) == 14


def test_a_share_of_the_labels_holds_every_smaller_one(train: SplitConfig) -> None:
    before = set[int]()
    for share in (0.05, 0.25, 0.5, 0.75):
        data = data_of(train, {"rest_of_train": True}, labelled_share=share)
        split = open_split(data, "train")
        labelled = {record.id for record in split.records}
        assert len(labelled) == round(20 * share) and before <= labelled
        assert split.unlabelled is not None
        rest = {record.id for record in split.unlabelled.records}
        assert not labelled & rest and len(labelled | rest) == 20
        assert not len(split.unlabelled.objects.labels)
        before = labelled
    others = open_split(data_of(train, None, labelled_share=0.5, labelled_seed=1), "train")  # type: ignore[arg-type]
    assert {record.id for record in others.records} != labelled and others.unlabelled is None


@pytest.mark.parametrize(("world_size", "parts"), [(2, 2), (1, 2), (2, 4), (3, 4), (1, 4)])
def test_a_step_shows_the_same_however_it_is_cut(
    train: SplitConfig, folder: Path, world_size: int, parts: int
) -> None:
    data = data_of(train, {"images": folder})
    whole = shown(loader_of(data).epoch(1))
    assert len(whole) == 5, "an epoch is that of the 20 images with labels, four a step"
    assert all(sum(row[0] for row in step) == 4 for step in whole)
    loaders = [loader_of(data, rank, world_size, parts) for rank in range(world_size)]
    steps = [
        [*itertools.chain(*step)]
        for step in zip(*(loader.epoch(1) for loader in loaders), strict=True)
    ]
    assert shown(steps) == whole
    for step in steps:
        assert all(targets.labelled == 4 // parts for _, targets in step)


def test_an_epoch_resumes_anywhere(train: SplitConfig, folder: Path) -> None:
    data = data_of(train, {"images": folder, "share": 0.25})
    whole = shown(loader_of(data).epoch(2))
    assert shown(loader_of(data).epoch(2, start_step=2)) == whole[2:]
    assert shown(loader_of(data).epoch(1)) != whole


def test_a_teacher_sees_its_size_of_both_kinds(train: SplitConfig, folder: Path) -> None:
    loader = loader_of(data_of(train, {"images": folder}))
    loader.show_teacher(2.0)
    for images, _ in itertools.chain(*loader.epoch(0)):
        assert images.for_teacher is not None
        sides = [pixels.shape[-2:] for pixels in (images.pixels, images.for_teacher.pixels)]
        assert len(images.for_teacher.pixels) == 8 and sides[1][0] >= 1.9 * sides[0][0]


def test_labels_of_the_rest_change_nothing(train: SplitConfig) -> None:
    """The pictures of a step do not depend on what is annotated in those without labels."""
    data = data_of(train, {"rest_of_train": True}, labelled_share=0.5)
    before = shown(loader_of(data).epoch(0))
    unlabelled = open_split(data, "train").unlabelled
    assert unlabelled is not None
    rest = {record.id for record in unlabelled.records}
    assert isinstance(train.annotations, Path)
    content = json.loads(train.annotations.read_bytes())
    content["annotations"] = [
        {**each, "bbox": [1, 1, 5, 5]} if each["image_id"] in rest else each
        for each in content["annotations"]
    ]
    train.annotations.write_text(json.dumps(content))
    assert shown(loader_of(data).epoch(0)) == before


@pytest.mark.parametrize("bucket", [True, False])
def test_every_pass_has_each_unlabelled_image_once(bucket: bool) -> None:
    sizes = np.random.default_rng(0).integers(20, 60, (50, 2))
    drawn: list[int] = []
    for epoch in range(6):
        batches = epoch_batches(sizes[:30], 6, 5, epoch, bucket)
        passes = unlabelled_passes(epoch, 5 * 4, 20)
        assert passes == range(epoch, epoch + 1)
        mixed = add_unlabelled(batches, sizes, 30, 4, passes, 5, epoch, bucket)
        assert np.array_equal(mixed[:, :6], batches), "images with labels come as without others"
        drawn += mixed[:, 6:].reshape(-1).tolist()
    for start in range(0, len(drawn), 20):
        assert sorted(drawn[start : start + 20]) == [*range(30, 50)]
    assert drawn[:20] != drawn[20:40]


@pytest.mark.parametrize("bucket", [True, False])
def test_an_epoch_across_passes_says_which_pass_each_image_is_of(bucket: bool) -> None:
    """12 of 8 images in an epoch: one pass and a half."""
    sizes = np.random.default_rng(0).integers(20, 60, (20, 2))
    drawn: list[int] = []
    for epoch, expected in enumerate((range(2), range(1, 3), range(3, 5), range(4, 6))):
        batches = epoch_batches(sizes[:12], 4, 5, epoch, bucket)
        passes = unlabelled_passes(epoch, 3 * 4, 8)
        assert passes == expected
        rows = np.concatenate([sizes, sizes[12:]])
        mixed = add_unlabelled(batches, rows, 12, 4, passes, 5, epoch, bucket)
        drawn += (mixed[:, 4:].reshape(-1) + 8 * passes.start - 12).tolist()
    assert sorted(drawn) == [*range(6 * 8)]


def test_images_of_like_shape_come_together() -> None:
    sizes = np.array([[20, 60], [60, 20]] * 20)
    batches = epoch_batches(sizes[:20], 5, 0, 0, bucket=True)
    mixed = add_unlabelled(batches, sizes, 20, 5, range(1), 0, 0, bucket=True)
    assert all(len(np.unique(sizes[batch], axis=0)) == 1 for batch in mixed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled": {}}, "needs one of images, rest_of_train and digit_scenes"),
        (
            {"unlabelled": {"images": "a", "rest_of_train": True}, "labelled_share": 0.5},
            "needs one",
        ),
        ({"unlabelled": {"images": "s3://bucket/photos"}}, "a URL's images are found by"),
        ({"unlabelled": {"rest_of_train": True}}, "labelled_share is 1"),
        ({"unlabelled": {"rest_of_train": True, "follow_links": True}}, "no effect without images"),
        ({"unlabelled": None, "labelled_seed": 3}, "labelled_seed has no effect"),
        ({"unlabelled": {"digit_scenes": {}}}, "not with files"),
        ({"unlabelled": {"images": "a", "share": 1.0}}, "less than 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    train: SplitConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(train, **settings)


def test_checks_know_the_folder(train: SplitConfig, folder: Path, write_split: Any) -> None:
    shutil.copy(folder / "0.png", folder / "copy.png")
    assert isinstance(train.images, Path)
    shutil.copy(train.images / "3.png", folder / "labelled.png")
    other = write_split([(40, 40)], [annotation(1, 1, 7, [4, 4, 16, 12])], name="validation")
    data = data_of(train, {"images": folder}, labelled_share=0.5, validation=other)
    report = check_data(data)
    facts = {split.name: split.facts for split in report.splits}
    assert facts["train"]["with_labels"] == 10 and facts["unlabelled"]["images"] == 15
    assert "boxes" not in facts["unlabelled"] and report.ok
    assert any("in unlabelled, so that their labels are known" in text for text in report.warnings)
    pixels = (folder / "below" / "1.png").read_bytes()
    (folder / "below" / "1.png").write_bytes(pixels[: len(pixels) // 2])
    report = check_data(data)
    broken = next(split for split in report.splits if split.name == "unlabelled")
    assert not report.ok and any("below/1.png: " in text for text in broken.errors)
