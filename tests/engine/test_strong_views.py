"""Strong augmentation in whole runs: stored teacher views of it, and where it ends."""

from pathlib import Path

import pytest
import torch
from engine.test_views import augmented, changed_section, placed, train, with_views
from tiny_runs import MakeConfig, losses

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.config.tree import Config
from d3etr.data.views import TeacherViews
from d3etr.engine.build import open_loader, open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.view_store import _named

STRONG = {"photometric": 0.5, "zoom_out": 0.5, "iou_crop": 0.8, "mosaic": 0.5}


def strong(config: Config, **changes: object) -> Config:
    """The run on stretched pictures that are augmented so."""
    config = augmented(config, **STRONG, **changes)
    kind = config.data.preprocessing.normalisation
    exact = PreprocessingConfig(exact_size=(48, 40), normalisation=kind)
    return changed_section(config, data=changed_section(config.data, preprocessing=exact))


def test_stored_views_are_of_the_pictures_that_are_shown(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = strong(with_views(make_config(detector={"dropout": 0.0}), {}))
    config = placed(config, tmp_path)
    train(config, tmp_path / "stored")
    monkeypatch.setattr(TeacherViews, "record", lambda *_: None)
    train(config, tmp_path / "running")
    running = losses(tmp_path / "running")
    assert losses(tmp_path / "stored") == pytest.approx(running, rel=1e-5, abs=1e-6)


def test_names_of_stores_know_nothing_of_what_is_off() -> None:
    assert {*_named(AugmentationConfig())} == {
        *("shortest_sides", "horizontal_flip", "vertical_flip", "crop"),
        *("colour_jitter", "channel_permutation", "inversion"),
    }
    sides = {"normalisation", "shortest_side", "longest_side"}
    assert {*_named(PreprocessingConfig())} == sides
    assert _named(PreprocessingConfig(exact_size=(64, 64)))["exact_size"] == [64, 64]
    assert _named(AugmentationConfig(mosaic=0.5))["mosaic"] == 0.5


@pytest.mark.parametrize(
    ("length", "last"),
    [({"epochs": 3, "steps": None}, 12), ({"epochs": None, "steps": 15}, 9)],
    ids=["epochs", "steps"],
)
def test_the_last_passes_of_a_run_are_without(
    make_config: MakeConfig, length: dict[str, int | None], last: int
) -> None:
    config = strong(make_config(), off_for_last_epochs=1)
    optimisation = changed_section(config.optimisation, **length)
    config = changed_section(config, optimisation=optimisation)
    context = SingleProcess(torch.device("cpu"))
    loader = open_loader(config, open_splits(config, context).train, context)
    each = len(loader.mine)
    assert loader.steps_per_epoch == 6
    keys = [key for epoch in range(3) for key in loader._keys(epoch)][::each]
    assert [key.shown.strong for key in keys] == [step < last for step in range(18)]
