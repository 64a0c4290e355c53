"""Runs whose teacher is read from the cache: the same losses, for equal pixels and no others."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILY, save_untrained, tiny_detector_config
from tiny_runs import MakeConfig, assert_same_run, losses, write_teacher

from d3etr.config.data import DataConfig
from d3etr.config.detector import StudentConfig, TeacherConfig
from d3etr.config.distillation import DistillationConfig
from d3etr.config.load import config_digest
from d3etr.config.tree import Config
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.distillation.distiller import Distiller
from d3etr.errors import UserError
from d3etr.storage.records import smallest
from d3etr.structures import ImageBatch
from d3etr.training.context import SingleProcess
from d3etr.training.journal import read_journal
from d3etr.training.run import run_training
from d3etr.training.step import TrainingStep

GIGABYTES = 0.01
IMAGES = 2 * 24  # two epochs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache's files are."""
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"


@pytest.fixture
def cached(make_config: MakeConfig) -> Any:
    """``make_config`` of runs with a cache."""

    def make(**sections: Any) -> Config:
        teacher = {"cache_gigabytes": GIGABYTES} | sections.pop("teacher", {})
        return make_config(teacher=teacher, **sections)

    return make


@pytest.fixture
def images_taught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Images in each forward pass of a teacher while it trains."""
    batches: list[int] = []
    original = Distiller.teach

    def teach(self: Distiller, images: Any, step: int = 0) -> Any:
        batches.append(len(images.pixels))
        return original(self, images, step)

    monkeypatch.setattr(Distiller, "teach", teach)
    yield batches


def train(config: Config, run_dir: Path) -> dict[str, float]:
    return run_training(config, run_dir, SingleProcess(torch.device("cpu")))


def counts(summary: dict[str, float]) -> tuple[float, ...]:
    return tuple(summary[f"teacher_cache/{name}"] for name in ("read", "computed", "unkept"))


def said(run_dir: Path, level: str) -> list[str]:
    records = read_journal(run_dir / "journal.jsonl")
    texts = [r["text"] for r in records if r["kind"] == "message" and r["level"] == level]
    return [text for text in texts if "the teacher does not lead" not in text]


def test_the_first_run_fills_the_cache_the_next_never_asks_the_teacher(
    make_config: MakeConfig, cached: Any, tmp_path: Path, images_taught: list[int]
) -> None:
    train(make_config(), tmp_path / "without")
    first = train(cached(), tmp_path / "first")
    assert sum(counts(first)[:2]) == IMAGES and counts(first)[1] >= 24
    images_taught.clear()
    second = train(cached(), tmp_path / "second")
    assert counts(second) == (IMAGES, 0, 0)
    stability = [7, 4, 3] * 2  # its validation images, in batches, are no training images
    assert sum(images_taught) <= 1 + sum(stability), "one image tells a record's layout"
    assert_same_run(tmp_path / "second", tmp_path / "first")
    for run in ("first", "second"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "without"), rel=1e-5)
    kept, read = said(tmp_path / "second", "info")
    assert "KB an image, up to" in kept
    assert read == f"teacher's outputs: {IMAGES} of {IMAGES} images (100%) were read from the " + (
        "cache, 0 computed"
    )


def test_the_cache_is_no_part_of_what_a_run_is(make_config: MakeConfig, cached: Any) -> None:
    assert config_digest(cached()) == config_digest(make_config())


def test_other_loss_weights_and_ratios_share_what_is_kept(
    make_config: MakeConfig, cached: Any, tmp_path: Path
) -> None:
    train(cached(), tmp_path / "first")
    settings = {"method": "d3etr", "teacher_query_ratio": 0.5, "prediction": {"weight": 3.0}}
    changed = {"distillation": DistillationConfig.model_validate(settings)}
    summary = train(cached().model_copy(update=changed), tmp_path / "other")
    assert counts(summary) == (IMAGES, 0, 0)
    train(make_config().model_copy(update=changed), tmp_path / "without")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_another_seed_reads_the_images_that_look_alike(
    make_config: MakeConfig, cached: Any, tmp_path: Path
) -> None:
    train(cached(), tmp_path / "first")
    summary = train(cached(run={"seed": 1}), tmp_path / "other")
    read, computed, _ = counts(summary)
    assert read > 0 and computed > 0 and read + computed == IMAGES
    train(make_config(run={"seed": 1}), tmp_path / "without")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_a_run_that_was_broken_off_goes_on_with_the_same_losses(
    make_config: MakeConfig, cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(), tmp_path / "without")
    original = TrainingStep.__call__

    def broken(self: TrainingStep, step: int, batches: Any) -> None:
        if step == 9:
            raise KeyboardInterrupt
        original(self, step, batches)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "__call__", broken)
        with pytest.raises(KeyboardInterrupt):
            train(cached(), tmp_path / "run")
    read, computed, _ = counts(train(cached(), tmp_path / "run"))
    assert read >= 12 and read + computed == 24, "the images of steps 6 to 8 had been kept"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_another_teacher_finds_nothing(
    cached: Any, tmp_path: Path, folder: Path, scenes: DataConfig
) -> None:
    first = counts(train(cached(), tmp_path / "first"))
    weights = tmp_path / "other.safetensors"
    write_teacher(weights, scenes, origin={"another": "file"})
    teacher = TeacherConfig(weights=weights, cache_gigabytes=GIGABYTES)
    other = train(cached().model_copy(update={"teacher": teacher}), tmp_path / "other")
    assert counts(other) == first
    assert len(list(folder.iterdir())) == 2


def test_a_program_that_computes_something_else_is_refused(
    cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cached(), tmp_path / "first")
    original = ConditionalDETR.encode
    monkeypatch.setattr(
        ConditionalDETR,
        "encode",
        lambda self, images: original(self, ImageBatch(images.pixels.abs(), images.padding)),
    )
    with pytest.raises(UserError, match=r"does not say what it said when .*\.records was filled"):
        train(cached(run={"seed": 1}), tmp_path / "other")


def test_a_full_cache_says_so_once_and_stays_within_its_size(
    make_config: MakeConfig, cached: Any, tmp_path: Path, folder: Path
) -> None:
    longer = {"optimisation": {"epochs": 6}}  # 24 images have more than 64 looks then
    train(make_config(**longer), tmp_path / "without")
    train(cached(), tmp_path / "first")
    (file,) = folder.iterdir()
    (number,) = re.findall(r"up to ([\d,]+) images", said(tmp_path / "first", "info")[0])
    record_bytes = file.stat().st_size // int(number.replace(",", "")) - 64
    limit = smallest(record_bytes)
    summary = train(cached(teacher={"cache_gigabytes": limit / 1e9}, **longer), tmp_path / "run")
    assert min(file.stat().st_size for file in folder.iterdir()) == limit
    assert counts(summary)[2] > 0
    (warning,) = said(tmp_path / "run", "warning")
    assert "is full (teacher.cache_gigabytes): the teacher runs for images" in warning
    assert "found no place in it" in said(tmp_path / "run", "info")[-1]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_a_disk_that_fills_up_costs_no_run(
    make_config: MakeConfig, cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(), tmp_path / "without")

    whole, calls = os.pwrite, iter(range(10**6))

    def full(*of: Any) -> int:
        if next(calls) < 2:  # the test picture's record and its entry
            return whole(*of)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        summary = train(cached(), tmp_path / "run")
    assert counts(summary) == (0, IMAGES, IMAGES)
    (warning,) = said(tmp_path / "run", "warning")
    assert "cannot be written any more (No space left on device)" in warning
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_a_cache_for_a_few_images_is_refused(cached: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"an image takes \d+ KB, and 0\.01 MB hold.* at least 0\.00"
    ):
        train(cached(teacher={"cache_gigabytes": 1e-5}), tmp_path / "run")


def test_images_of_several_sizes_are_refused(cached: Any, tmp_path: Path) -> None:
    config = cached()
    cropped = config.data.augmentation.model_copy(update={"crop": 0.5})
    data = config.data.model_copy(update={"augmentation": cropped})
    with pytest.raises(UserError, match=r"images of one size.*they have sizes drawn at random"):
        train(config.model_copy(update={"data": data}), tmp_path / "run")


def test_a_two_stage_teacher_is_refused(cached: Any, tmp_path: Path, scenes: DataConfig) -> None:
    detector = tiny_detector_config(**FAMILY["deformable-two-stage"], width=32)
    weights = tmp_path / "teacher.safetensors"
    save_untrained(weights, detector, scenes)
    changes = {
        "student": StudentConfig(detector=detector),
        "teacher": TeacherConfig(weights=weights, cache_gigabytes=GIGABYTES),
        "distillation": DistillationConfig.model_validate(
            {"method": "d3etr", "cross_attention": {"weight": 0.0}}
        ),
    }
    with pytest.raises(UserError, match="queries that a two-stage teacher makes"):
        train(cached().model_copy(update=changes), tmp_path / "run")


def test_a_control_that_never_asks_the_teacher_says_what_has_no_effect(
    cached: Any, tmp_path: Path, folder: Path
) -> None:
    off = {"weight": 0.0}
    control = DistillationConfig.model_validate(
        {
            "method": "d3etr",
            "auxiliary_group": {"queries": "random", "assignment": "own"},
            **dict.fromkeys(("prediction", "self_attention", "cross_attention"), off),
        }
    )
    config = cached(teacher={"precision": "bfloat16"})
    summary = train(config.model_copy(update={"distillation": control}), tmp_path / "run")
    precision, cache = said(tmp_path / "run", "warning")
    assert precision.startswith("teacher.precision has no effect")
    assert cache.startswith("teacher.cache_gigabytes has no effect")
    assert not folder.exists() and "teacher_cache/read" not in summary


def test_general_points_are_refused_in_the_recipe(cached: Any) -> None:
    points = {"method": "kd_detr", "general_points": {"count": 5}}
    distillation = DistillationConfig.model_validate(points)
    tree = {name: getattr(cached(), name) for name in Config.model_fields}
    with pytest.raises(ValueError, match=r"cache_gigabytes cannot keep .* the 5 distillation\.g"):
        Config(**(tree | {"distillation": distillation}))


def test_a_teacher_in_lower_precision_teaches_nearly_the_same_and_has_a_file_of_its_own(
    make_config: MakeConfig, cached: Any, tmp_path: Path, folder: Path
) -> None:
    for name, teacher in (("exact", {}), ("rounded", {"precision": "bfloat16"})):
        train(make_config(teacher=teacher), tmp_path / name)
        train(cached(teacher=teacher), tmp_path / f"{name}-kept")
        assert losses(tmp_path / f"{name}-kept") == pytest.approx(losses(tmp_path / name), rel=1e-5)
    exact, rounded = (losses(tmp_path / name) for name in ("exact", "rounded"))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)
    assert len([*folder.iterdir()]) == 2
