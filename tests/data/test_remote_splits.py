"""Splits on a storage: the same digests and the same errors as from folders."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from coco_files import annotation

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig, SplitConfig
from d3etr.config.location import Url
from d3etr.data.checks import check_data
from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import read_split
from d3etr.errors import UserError

WriteSplit = Callable[..., SplitConfig]
BOXES = [annotation(1, 1, 7, [1, 1, 9, 9]), annotation(2, 2, 3, [2, 2, 8, 8])]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The storage behind ``memory://``."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def uploaded(files: fsspec.AbstractFileSystem, local: SplitConfig, name: str) -> SplitConfig:
    assert isinstance(local.images, Path) and isinstance(local.annotations, Path)
    for image in local.images.iterdir():
        files.pipe(f"/shared/{name}/{image.name}", image.read_bytes())
    files.pipe(f"/shared/{name}.json", local.annotations.read_bytes())
    return SplitConfig(
        images=Url(f"memory://shared/{name}"), annotations=Url(f"memory://shared/{name}.json")
    )


def test_a_split_is_the_same_wherever_it_is(
    write_split: WriteSplit, memory: fsspec.AbstractFileSystem
) -> None:
    local = write_split([(40, 30), (30, 50)], BOXES)
    here, there = read_split("train", local), read_split("train", uploaded(memory, local, "a"))
    assert here.digest == there.digest
    assert [record.id for record in here.records] == [record.id for record in there.records]
    samples = [
        DetectionDataset(split, PreprocessingConfig(), AugmentationConfig()).sample(1, epoch=2)
        for split in (here, there)
    ]
    assert (samples[0].pixels == samples[1].pixels).all()
    assert (samples[0].boxes_cxcywh == samples[1].boxes_cxcywh).all()


def test_paths_and_urls_mix(write_split: WriteSplit, memory: fsspec.AbstractFileSystem) -> None:
    local = write_split([(40, 30)], BOXES[:1])
    remote = uploaded(memory, local, "a")
    mixed = SplitConfig(images=remote.images, annotations=local.annotations)
    assert read_split("train", mixed).digest == read_split("train", local).digest


def test_missing_images_are_named_as_from_a_folder(
    write_split: WriteSplit, memory: fsspec.AbstractFileSystem
) -> None:
    remote = uploaded(memory, write_split([(40, 30), (30, 50)], BOXES), "a")
    memory.rm("/shared/a/2.png")
    for fetch in (True, False):
        with pytest.raises(UserError) as caught:
            read_split("train", remote, fetch=fetch)
        assert str(caught.value).startswith(
            "data.train.annotations memory://shared/a.json: 1 of 2 images are not in "
            "memory://shared/a: 2.png (image id 2)"
        )


def test_looking_fetches_no_image_and_gives_the_digest(
    write_split: WriteSplit, memory: fsspec.AbstractFileSystem, cache: Path
) -> None:
    local = write_split([(40, 30), (30, 50)], BOXES)
    looked = read_split("train", uploaded(memory, local, "a"), fetch=False)
    assert looked.digest == read_split("train", local).digest
    assert sum(path.is_file() and path.name != "lock" for path in cache.rglob("*")) == 1


def test_a_damaged_image_is_named_by_its_url(
    write_split: WriteSplit, memory: fsspec.AbstractFileSystem
) -> None:
    remote = uploaded(memory, write_split([(40, 30), (30, 50)], BOXES), "a")
    memory.pipe("/shared/a/2.png", b"no picture")
    dataset = DetectionDataset(read_split("train", remote), PreprocessingConfig())
    with pytest.raises(UserError, match=r"^image id 2: memory://shared/a/2\.png: cannot be"):
        dataset.sample(1, epoch=0)
    dataset.sample(0, epoch=0)


def test_check_data_looks_at_urls_as_at_folders(
    write_split: WriteSplit, memory: fsspec.AbstractFileSystem
) -> None:
    splits = {
        name: write_split([(40, 30), (30, 50)], BOXES, name=name)
        for name in ("train", "validation")
    }
    remote = {name: uploaded(memory, split, name) for name, split in splits.items()}
    report = check_data(DataConfig(**remote))
    assert report.ok
    assert report.splits[0].facts["images_folder"] == "memory://shared/train"
    assert (
        report.splits[0].facts["digest"]
        == check_data(DataConfig(**splits)).splits[0].facts["digest"]
    )
    memory.rm("/shared/train/1.png")
    assert "1.png (image id 1)" in check_data(DataConfig(**remote)).splits[0].errors[0]
    broken = remote | {
        "train": SplitConfig(images=Url("memory://plcae"), annotations=Url("memory://plcae.json"))
    }
    (error,) = check_data(DataConfig(**broken)).splits[0].errors
    assert error == "data.train.annotations: memory://plcae.json does not exist: check the URL"
