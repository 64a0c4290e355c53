"""Stored teacher views: losses as with the teacher running, stores, and what breaks them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_workers import train_with_two_workers
from tiny import FAMILY, changed, save_untrained
from tiny_runs import DETECTOR, MakeConfig, assert_same_run, losses, values

from d3etr.config.tree import Config
from d3etr.data import views as data_views
from d3etr.data.dataset import DetectionDataset
from d3etr.data.transforms import Sample
from d3etr.data.views import TeacherViews, open_shard
from d3etr.engine import view_records
from d3etr.engine.build import build_models, open_loader, open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.run import run_training
from d3etr.engine.view_store import ViewStore
from d3etr.engine.views import prepare_views
from d3etr.errors import UserError

PREDICTIONS = {"self_attention": {"weight": 0}, "cross_attention": {"weight": 0}}


def with_views(config: Config, method: dict[str, Any] | None = None, **views: Any) -> Config:
    """The run with stored views in float32, distilling predictions only unless ``method`` says."""
    tree = config.model_dump(mode="json")
    tree["teacher"]["views"] = {"count": 2, "precision": "float32"} | views
    tree["distillation"] = {"method": "d3etr"} | (PREDICTIONS if method is None else method)
    if "inherited_ratio" in tree["distillation"]:
        tree["student"]["initialise_from"] = {}
        tree["student"]["detector"]["queries"] = 8
    return Config.model_validate_json(json.dumps(tree))


def without_views(config: Config) -> Config:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"views": None})})


def train(config: Config, folder: Path) -> None:
    run_training(config, folder, SingleProcess(torch.device("cpu")))


def placed(config: Config, root: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"output": root})})


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("teacher-views/*/*.safetensors"))


def taught_by(variant: str, make_config: MakeConfig, folder: Path, **sections: Any) -> Config:
    """A student of the kind of its untrained teacher, one of ``FAMILY``."""
    weights = folder / "teacher.safetensors"
    detector = changed(DETECTOR, **FAMILY[variant], queries=8, dropout=0.0, heads=2)
    save_untrained(weights, detector, make_config().data)
    levels = detector.feature_levels
    student: dict[str, Any] = {"levels": levels} if levels > 1 else {}
    if "encoder_layers" in FAMILY[variant]:  # a kind without the encoder that others have
        student = FAMILY[variant]
    if isinstance(getattr(detector, "points", None), tuple):  # one number for each level
        student["points"] = detector.points
    own = {"name": detector.name, "dropout": 0.0, **detector.edge_bins} | student
    return make_config(teacher={"weights": weights}, detector=own, **sections)


@pytest.fixture
def teacher_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that the teacher was shown for storing, in calls."""
    found: list[int] = []
    real = view_records.outputs_to_store

    def counted(teacher: Any, images: Any, parts: Any) -> Any:
        found.append(len(images.pixels))
        return real(teacher, images, parts)

    monkeypatch.setattr(view_records, "outputs_to_store", counted)
    return found


METHODS = {
    "predictions": PREDICTIONS,
    "part of the queries": PREDICTIONS | {"teacher_query_ratio": 0.5},
    "attention": {},
    "inherited": {"inherited_ratio": 1.0},
    "kd-detr": {"method": "kd_detr", "general_points": {"count": 0}},
    "detrdistill": {"method": "detrdistill", "features": {"weight": 0.0}},
    "refined": PREDICTIONS | {"refine_teacher": True},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_losses_are_those_of_a_teacher_that_runs(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    config = placed(with_views(make_config(detector={"dropout": 0.0}), method), tmp_path)
    train(config, tmp_path / "stored")
    # The same pictures, but nothing that was stored comes with them.
    monkeypatch.setattr(TeacherViews, "record", lambda *_: None)
    train(config, tmp_path / "running")
    running = losses(tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(running, rel=1e-6, abs=1e-6)
    assert len(running) == 12


def test_without_random_augmentation_views_change_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = augmented(make_config(), channel_permutation=0.0)
    config = placed(with_views(config, count=1), tmp_path)
    train(config, tmp_path / "stored")
    train(without_views(config), tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "running"), rel=1e-6)


def changed_section(section: Any, **changes: Any) -> Any:
    return section.model_copy(update=changes)


def augmented(config: Config, **changes: Any) -> Config:
    augmentation = changed_section(config.data.augmentation, **changes)
    return changed_section(config, data=changed_section(config.data, augmentation=augmentation))


@pytest.mark.parametrize("variant", FAMILY)
def test_every_kind_of_teacher_can_be_stored(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    config = taught_by(variant, make_config, tmp_path, optimisation={"epochs": 1})
    config = placed(with_views(config, {}), tmp_path)
    train(config, tmp_path / "stored")
    monkeypatch.setattr(TeacherViews, "record", lambda *_: None)
    train(config, tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "running"), rel=1e-5)


def test_distributions_can_be_stored(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = taught_by("d_fine", make_config, tmp_path, optimisation={"epochs": 1})
    config = placed(with_views(config, {"method": "distribution"}), tmp_path)
    assert _store(config).folder != _store(with_views(config)).folder
    train(config, tmp_path / "stored")
    assert values(tmp_path / "stored", "train/distribution/kl")[-1] > 0
    monkeypatch.setattr(TeacherViews, "record", lambda *_: None)
    train(config, tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "running"), rel=1e-5)


def test_a_teacher_that_sees_more_can_be_stored(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(detector={"dropout": 0.0}, teacher={"image_scale": 1.5})
    config = placed(with_views(config, {}), tmp_path)
    train(config, tmp_path / "stored")
    real = DetectionDataset.sample

    def with_teacher_pixels(
        dataset: DetectionDataset, index: int, epoch: int, **_: object
    ) -> Sample:
        views, seed = dataset.views, dataset.seed
        if views is None:
            return real(dataset, index, epoch)
        dataset.views, dataset.seed = None, views.seed
        try:
            return real(dataset, index, views.view(epoch, index))
        finally:
            dataset.views, dataset.seed = views, seed

    monkeypatch.setattr(TeacherViews, "record", lambda *_: None)
    monkeypatch.setattr(DetectionDataset, "sample", with_teacher_pixels)
    train(config, tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "running"), rel=1e-5)


def test_a_view_is_shown_once_in_every_k_epochs(tmp_path: Path) -> None:
    views = TeacherViews(tmp_path, count=5, seed=0, order=3, shard_images=1)
    for index in range(20):
        for first in (0, 5, 10):
            shown = {views.view(epoch, index) for epoch in range(first, first + 5)}
            assert shown == set(range(5))
    orders = {tuple(views.view(epoch, index) for epoch in range(5)) for index in range(20)}
    assert len(orders) > 10


def test_a_resumed_run_ends_as_an_undisturbed_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = placed(with_views(make_config(), precision="float16"), tmp_path)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("summary.json", "weights.safetensors"):
        (tmp_path / "again" / name).unlink()
    newest = max((tmp_path / "again" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    train(config, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "whole")


@pytest.mark.slow
def assert_stored_the_same(ours: Sequence[Path], theirs: Sequence[Path]) -> None:
    """Shards of the same names and views, but for rounding: workers look at other batches."""
    assert [path.name for path in ours] == [path.name for path in theirs]
    for left, right in zip(map(open_shard, ours), map(open_shard, theirs), strict=True):
        assert left.keys() == right.keys()
        for name, stored in left.items():
            np.testing.assert_allclose(right[name], stored, rtol=1e-4, atol=1e-5, err_msg=name)


def test_two_workers_store_and_learn_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    base = with_views(make_config(detector={"dropout": 0.0}), {}, count=3)
    alone, together = placed(base, tmp_path / "one"), placed(base, tmp_path / "two")
    train(alone, tmp_path / "alone")
    train_with_two_workers(together, tmp_path / "together")
    ours, theirs = shards(tmp_path / "one"), shards(tmp_path / "two")
    assert len(ours) == 3
    assert_stored_the_same(ours, theirs)
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "together"), rel=1e-5)


class Killed(Exception):  # noqa: N818 - it is no mistake
    """Stands for the end of a process."""


def test_storing_goes_on_where_it_stopped(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher_passes: list[int],
) -> None:
    config = placed(with_views(make_config(), count=4), tmp_path)
    real, calls = data_views.save_file, 0

    def breaks(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            path.write_bytes(b"half a shard")
            raise Killed
        real(tensors, path, metadata)

    monkeypatch.setattr(data_views, "save_file", breaks)
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    kept = {path: path.read_bytes() for path in shards(tmp_path)}
    assert len(kept) == 2
    monkeypatch.undo()
    train(config, tmp_path / "run")
    assert len(shards(tmp_path)) == 4
    assert all(path.read_bytes() == content for path, content in kept.items())
    leftovers = [path for path in (tmp_path / "teacher-views").rglob("*.tmp")]
    assert leftovers == []


def test_a_store_is_made_once_and_more_views_join_it(
    make_config: MakeConfig, tmp_path: Path, teacher_passes: list[int]
) -> None:
    config = placed(with_views(make_config()), tmp_path)
    train(config, tmp_path / "first")
    assert sum(teacher_passes) == 1 + 2 * 24
    teacher_passes.clear()
    other_seed = changed_section(config, run=changed_section(config.run, seed=5))
    train(other_seed, tmp_path / "second")
    assert sum(teacher_passes) == 1
    teacher_passes.clear()
    views = changed_section(config.teacher.views, count=3)
    teacher = changed_section(config.teacher, views=views)
    train(changed_section(config, teacher=teacher), tmp_path / "third")
    assert sum(teacher_passes) == 1 + 24
    assert len([*(tmp_path / "teacher-views").iterdir()]) == 1


CHANGES: dict[str, Callable[[Config], Config]] = {
    "augmentation": lambda c: changed_section(
        c,
        data=changed_section(
            c.data, augmentation=changed_section(c.data.augmentation, inversion=0.5)
        ),
    ),
    "seed": lambda c: with_views(c, seed=1),
    "queries": lambda c: with_views(c, queries=5),
    "precision": lambda c: with_views(c, precision="float16"),
    "attention": lambda c: with_views(c, {}),
    "layers": lambda c: with_views(c, PREDICTIONS | {"layer_map": "last"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_store_depends_on_makes_another(
    make_config: MakeConfig, tmp_path: Path, change: Callable[[Config], Config]
) -> None:
    config = with_views(make_config())
    before, after = (_store(placed(c, tmp_path)).folder for c in (config, change(config)))
    assert before != after


def test_another_teacher_makes_another_store(make_config: MakeConfig, tmp_path: Path) -> None:
    config = placed(with_views(make_config()), tmp_path)
    before = _store(config).folder
    weights = tmp_path / "other.safetensors"
    save_untrained(weights, changed(DETECTOR, queries=7, dropout=0.0), config.data)
    teacher = changed_section(config.teacher, weights=weights)
    assert _store(changed_section(config, teacher=teacher)).folder != before


def _store(config: Config) -> ViewStore:
    context = SingleProcess(torch.device("cpu"))
    splits = open_splits(config, context)
    models = build_models(config, splits, context)
    assert models.teacher is not None
    method = models.distiller.method
    return ViewStore(config, splits.train, models.teacher, method, models.digests, context)


@pytest.mark.parametrize("place", [4, 40, -1], ids=["length", "header", "content"])
def test_a_damaged_shard_is_named(make_config: MakeConfig, tmp_path: Path, place: int) -> None:
    config = placed(with_views(make_config()), tmp_path)
    train(config, tmp_path / "first")
    broken = shards(tmp_path)[1]
    content = bytearray(broken.read_bytes())
    content[place] ^= 0x41
    broken.write_bytes(content)
    with pytest.raises(UserError, match=f"{broken.name}.* is damaged.*remove that file"):
        train(config, tmp_path / "second")
    broken.unlink()
    train(config, tmp_path / "second")
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


@pytest.mark.parametrize("method", [PREDICTIONS, {}], ids=["predictions", "attention"])
def test_the_forecast_is_what_the_store_takes(
    make_config: MakeConfig, tmp_path: Path, method: dict[str, Any]
) -> None:
    config = augmented(make_config(), crop=0.7, shortest_sides=(32, 48, 64), horizontal_flip=0.5)
    config = placed(with_views(config, method, count=5), tmp_path)
    forecast = _store(config).forecast()
    assert forecast.total == forecast.missing
    train(config, tmp_path / "run")
    taken = sum(path.stat().st_size for path in shards(tmp_path))
    assert taken == pytest.approx(forecast.total, rel=0.05)
    assert _store(config).forecast().missing == 0


def test_a_store_that_is_too_large_is_refused_before_it_is_begun(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = placed(with_views(make_config(), {}, maximum_gigabytes=1e-5), tmp_path)
    with pytest.raises(UserError) as raised:
        train(config, tmp_path / "run")
    for text in ("maximum_gigabytes", "views.count below 2", "views.queries below 8", "attention"):
        assert text in str(raised.value)
    assert not (tmp_path / "teacher-views").exists()


REFUSED = {
    "features": ({"features": {"weight": 1.0}}, "features.weight to 0"),
    "cosine of features": ({"method": "feature_cosine"}, "this method compares: remove it"),
    "memory and queries of objects": (
        {"method": "clockdistill"},
        "made of objects.*remove it.*memory tokens, which this method compares: remove it",
    ),
    "queries of objects": (
        {"method": "clockdistill", "foreground_weight": 0, "background_weight": 0},
        "made of objects, which this method compares: remove it",
    ),
    "memory under masks": (
        {"method": "clockdistill", "target_weight": 0},
        "memory tokens, which this method compares: remove it",
    ),
    "points": ({"general_points": {"count": 4}}, "general_points.count to 0"),
    "control": (
        {
            "auxiliary_group": {"queries": "random", "assignment": "own"},
            "prediction": {"weight": 0},
            "adaptive_ratio": 0.0,
        }
        | PREDICTIONS,
        "has no effect",
    ),
}


@pytest.mark.parametrize(("method", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_is_refused(
    make_config: MakeConfig, tmp_path: Path, method: dict[str, Any], text: str
) -> None:
    config = placed(with_views(make_config(), method), tmp_path)
    with pytest.raises(UserError, match=f"teacher.views.*{text}"):
        train(config, tmp_path / "run")


def test_a_part_of_the_queries_is_the_most_confident_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = placed(with_views(make_config(), {}, queries=3), tmp_path)
    context = SingleProcess(torch.device("cpu"))
    splits = open_splits(config, context)
    models = build_models(config, splits, context)
    loader = open_loader(config, splits.train, context)
    loader.use_views(*prepare_views(config, splits.train, models, context))
    [(images, targets)] = next(loader.epoch(0))
    stored = models.distiller.run_teacher(images)
    running = models.distiller.run_teacher(type(images)(images.pixels, images.padding))
    assert stored is not None and running is not None
    kept = running.main.confidence()[-1].topk(3).indices.sort().values
    found = stored.groups["detection"].kept
    assert torch.equal(found, kept)
    index = kept[None, :, :, None].expand(2, -1, -1, 4)
    torch.testing.assert_close(stored.main.boxes_cxcywh, running.main.boxes_cxcywh.gather(2, index))
    rows = running.main.cross_attention.gather(
        3, kept[None, :, None, :, None].expand(2, -1, 2, -1, running.main.cross_attention.shape[-1])
    )
    torch.testing.assert_close(stored.main.cross_attention, rows)
    sums = models.distiller.normalisers(targets, stored)
    terms = models.distiller(images, targets, stored, sums)
    assert all(torch.isfinite(loss) for loss in terms.values())


def test_kept_queries_are_paired_with_the_students_of_their_numbers(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    method = PREDICTIONS | {"inherited_ratio": 1.0}
    config = placed(with_views(make_config(), method, queries=3), tmp_path)
    context = SingleProcess(torch.device("cpu"))
    splits = open_splits(config, context)
    models = build_models(config, splits, context)
    loader = open_loader(config, splits.train, context)
    loader.use_views(*prepare_views(config, splits.train, models, context))
    [(images, targets)] = next(loader.epoch(0))
    distiller = models.distiller.eval()
    stored = distiller.run_teacher(images)
    assert stored is not None
    sums = distiller.normalisers(targets, stored)
    found = distiller(images, targets, stored, sums)["inherited/l1"]
    memory = distiller.student.encode(images)
    [student] = distiller.student.decode(memory, [distiller.student.object_queries()])
    kept, expected = stored.groups["detection"].kept, 0.0
    assert kept is not None
    for layer in range(2):
        weights = stored.main.confidence()[layer]
        for image in range(4):
            for row in range(3):
                ours = student.boxes_cxcywh[layer, image, kept[image, row]]
                theirs = stored.main.boxes_cxcywh[layer, image, row]
                distance = (ours - theirs).detach().abs().sum()
                expected += float(weights[image, row] / weights.sum() * distance)
    assert float(found.detach()) == pytest.approx(2.0 * 5.0 * expected, rel=1e-5)
