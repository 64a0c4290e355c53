"""Every format reads the same scenes into equal records; found by path, name and entry point."""

from __future__ import annotations

import logging
import os
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_files import picture
from format_writers import WRITERS

from d3etr import registry
from d3etr.config.data import DataConfig, DigitScenesConfig, SplitConfig
from d3etr.config.load import validate
from d3etr.config.location import Url
from d3etr.config.problems import ConfigError
from d3etr.data.annotations import Annotations, Source
from d3etr.data.checks import check_data
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.formats import find_format
from d3etr.data.splits import DetectionSplit, open_split, read_split
from d3etr.errors import UserError
from d3etr.registry import FORMATS

SCENES = {"train_images": 12, "validation_images": 5, "test_images": 4}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SplitConfig]:
    """Digit scenes as COCO files; sides of 64 pixels, so that fractions are exact."""
    root = tmp_path_factory.mktemp("scenes")
    return write_digit_scenes(DigitScenesConfig(root=root, **SCENES))


@pytest.fixture(params=sorted(WRITERS))
def written(
    request: pytest.FixtureRequest, coco: dict[str, SplitConfig], tmp_path: Path
) -> dict[str, SplitConfig]:
    """The same scenes in another format."""
    return WRITERS[request.param](coco, tmp_path)


def assert_equal_records(found: DetectionSplit, expected: DetectionSplit) -> None:
    assert found.categories == expected.categories
    for ours, theirs in zip(found.records, expected.records, strict=True):
        assert (ours.id, ours.width, ours.height) == (theirs.id, theirs.width, theirs.height)
        assert ours.file_name.endswith(theirs.file_name)
        # Objects in a text file have the order that they were written in.
        for name in ("labels", "boxes_xywh", "areas", "crowd"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert found.path(ours).read_bytes() == expected.path(theirs).read_bytes()


def test_the_same_scenes_give_equal_records_in_every_format(
    coco: dict[str, SplitConfig], written: dict[str, SplitConfig]
) -> None:
    for name, split in written.items():
        assert_equal_records(read_split(name, split), read_split(name, coco[name]))


def test_one_line_names_a_whole_data_set(written: dict[str, SplitConfig]) -> None:
    place = str(written["train"].annotations)
    tree = {"data": {"dataset": place}, "optimisation": {"steps": 1}}
    data = validate(tree, "test").data
    assert data.dataset is None
    assert data.train == data.validation == SplitConfig(annotations=Path(place))
    counts = [len(open_split(data, name).records) for name in ("train", "validation")]
    assert counts == [SCENES["train_images"], SCENES["validation_images"]]


def test_a_whole_data_set_and_a_split_are_too_much() -> None:
    split = {"images": "i", "annotations": "a.json"}
    tree = {"data": {"dataset": "data.yaml", "train": split, "validation": split}}
    with pytest.raises(ConfigError, match=r"data\.dataset: .*remove train and validation"):
        validate(tree, "test")


def test_checks_work_on_every_format(written: dict[str, SplitConfig]) -> None:
    report = check_data(DataConfig(**written))
    assert report.ok, report.text()
    assert [split.facts["images"] for split in report.splits] == list(SCENES.values())
    title = find_format("auto", written["train"].annotations)[1].title
    assert all(split.facts["format"] == title for split in report.splits)
    assert title in report.text()


def test_the_digest_follows_content_not_place(
    written: dict[str, SplitConfig], tmp_path: Path
) -> None:
    first = read_split("validation", written["validation"]).digest
    assert len({read_split(name, split).digest for name, split in written.items()}) == 3
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert isinstance(written["validation"].annotations, Path)
    place = moved / written["validation"].annotations.relative_to(tmp_path)
    assert read_split("validation", SplitConfig(annotations=place)).digest == first
    changed = next(
        path
        for kind in ("labels/val/*.txt", "Annotations/val*.xml", "validation/metadata.jsonl")
        for path in sorted(moved.glob(kind))
    )
    changed.write_text(changed.read_text() + "\n")
    assert read_split("validation", SplitConfig(annotations=place)).digest != first


def test_the_log_says_which_format_was_taken(
    written: dict[str, SplitConfig], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        read_split("test", written["test"])
    assert f"{written['test'].annotations}: read as" in caplog.text


def test_a_folder_in_no_known_format_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in no format that is known: found neither data\.yaml"):
        read_split("train", SplitConfig(annotations=tmp_path))


@pytest.mark.parametrize("place", ["https://host/data.yaml", "s3://bucket/voc/"])
def test_other_formats_are_read_from_this_machine_alone(place: str) -> None:
    with pytest.raises(UserError, match="folders of this machine"):
        find_format("auto", Url(place))
    with pytest.raises(UserError, match="folders of this machine only"):
        find_format("voc", Url(place))


def test_coco_needs_images_and_has_no_subsets(coco: dict[str, SplitConfig]) -> None:
    tree = {"data": {"train": {"annotations": "a.json"}, "validation": {"annotations": "a.json"}}}
    with pytest.raises(ConfigError, match=r"data\.train\.images: .*missing"):
        validate(tree | {"optimisation": {"steps": 1}}, "test")
    with pytest.raises(UserError, match="take 'subset' out"):
        read_split("train", coco["train"].model_copy(update={"subset": "val"}))


def test_nothing_is_imported_that_is_not_asked_for() -> None:
    import subprocess

    code = (
        "import sys; from d3etr.data import formats; from pathlib import Path; "
        "formats.find_format('coco', Path('a')); "
        "print([n for n in ('yolo', 'voc', 'imagefolder') if f'd3etr.data.formats.{n}' in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class OneImage:
    """A stranger's format: a text file with ``name width height``; no objects."""

    title = "one image"

    def read(self, source: Source) -> Annotations:
        """One image."""
        from d3etr.data.annotations import Category, ImageEntry

        name, width, height = source.annotations.read_text().split()
        image = ImageEntry(1, name, int(width), int(height))
        return Annotations((Category(0, "cat"),), [image], [], "digest")


def declare(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    """Entry points as if packages had been installed that bring them."""
    found = [EntryPoint(name, value, FORMATS.group) for name, value in points]
    monkeypatch.setattr(registry, "_entry_points", lambda group, path: found)


def test_a_package_adds_a_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, coco: dict[str, SplitConfig]
) -> None:
    declare(monkeypatch, ("one", f"{__name__}:OneImage"), ("broken", "nowhere.at_all:Format"))
    images = coco["train"].images
    (tmp_path / "one.txt").write_text("000001.png 64 64")
    split = SplitConfig(images=images, annotations=tmp_path / "one.txt", format="one")
    assert [record.file_name for record in read_split("train", split).records] == ["000001.png"]


def test_the_guides_example_is_a_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (repository / "docs/data.md").read_text(), re.S)
    (tmp_path / "guides_format.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    declare(monkeypatch, ("mine", "guides_format:Mine"))
    picture(640, 480).save(tmp_path / "a.png")
    split = SplitConfig(images=tmp_path, annotations=tmp_path / "any", format="mine")
    [record] = read_split("train", split).records
    assert record.boxes_xywh.tolist() == [[10, 20, 30, 40]]


@pytest.mark.parametrize(
    ("name", "points", "words"),
    [
        ("other", [], ["no data format 'other'", *FORMATS.built_in, "d3etr.formats"]),
        ("other", [("mine", "m:F")], ["expected one of", "mine"]),
        ("gone", [("gone", "nowhere.at_all:F")], ["'gone'", "nowhere.at_all:F", "ModuleNotFound"]),
        ("coco", [("coco", "m:F")], ["'coco'", "d3etr's own", "another name"]),
        ("two", [("two", "a:F"), ("two", "b:F")], ["'two'", "a:F", "b:F", "uninstall one"]),
    ],
)
def test_what_is_wrong_with_formats_of_others_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, points: list[tuple[str, str]], words: list[str]
) -> None:
    declare(monkeypatch, *points)
    with pytest.raises(UserError) as caught:
        find_format(name, Path("x"))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_formats_that_nobody_asked_for_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, ("gone", "nowhere.at_all:F"), ("yolo", "nowhere.at_all:F"))
    assert find_format("auto", Path("a.json"))[0] == "coco"


def test_image_numbers_are_the_same_whatever_the_order_of_the_folder(
    coco: dict[str, SplitConfig], tmp_path: Path
) -> None:
    split = WRITERS["yolo"](coco, tmp_path)["train"]
    names = [(record.id, record.file_name) for record in read_split("train", split).records]
    again = sorted((tmp_path / "images" / "train").iterdir(), reverse=True)
    for path in again:  # new entries of the folder, in another order
        os.link(path, path.with_suffix(".tmp"))
        path.unlink()
        path.with_suffix(".tmp").rename(path)
    assert names == [(r.id, r.file_name) for r in read_split("train", split).records]
    assert [number for number, _ in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("path", ["{folder}/..", "sets"])
def test_yolos_path_begins_at_the_file_or_at_a_folder_above_it(
    path: str, coco: dict[str, SplitConfig], tmp_path: Path
) -> None:
    split = WRITERS["yolo"](coco, tmp_path / "sets")["train"]
    content = yaml.safe_load(split.annotations.read_text())
    own = tmp_path / "lists" / "data.yaml"
    own.parent.mkdir()
    folder = (tmp_path / "sets" / "x").relative_to(tmp_path)
    own.write_text(yaml.safe_dump(content | {"path": path.format(folder=f"../{folder}")}))
    (tmp_path / folder).mkdir()
    moved = split.model_copy(update={"annotations": own})
    expected = [record.file_name for record in read_split("train", split).records]
    assert [record.file_name for record in read_split("train", moved).records] == expected


def test_yolos_path_does_not_begin_at_the_working_directory(
    coco: dict[str, SplitConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = WRITERS["yolo"](coco, tmp_path / "here" / "sets")["train"]
    own = tmp_path / "elsewhere" / "data.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(yaml.safe_load(split.annotations.read_text()) | {"path": "sets"}))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"path 'sets' is no folder .* a folder above it"):
        read_split("train", split.model_copy(update={"annotations": own}))
