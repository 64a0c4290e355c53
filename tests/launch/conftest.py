"""Tiny runs for tests of launching."""

from collections.abc import Callable
from pathlib import Path

import pytest

from d3etr.config.load import load_config
from d3etr.config.tree import Config

TINY = """
run: {name: tiny}
data:
  digit_scenes: {train_images: 24, validation_images: 8, test_images: 4, image_size: 32,
                 minimum_scale: 8, maximum_scale: 16}
  preprocessing: {normalisation: per_image, shortest_side: null, longest_side: null}
  augmentation: {horizontal_flip: 0.0}
  bucket_by_aspect: false
  workers: 0
student:
  detector:
    backbone: {name: small, stem_width: 8, stage_widths: [8, 8, 16]}
    width: 16
    heads: 2
    encoder_layers: 1
    decoder_layers: 2
    feedforward: 16
    queries: 6
    dropout: 0.0
optimisation: {epochs: 3, batch_size: 4, learning_rate: 1.0e-3, backbone_learning_rate: 1.0e-3}
cluster: {maximum_failures: 1, threads_per_worker: 1}
tracking: {enabled: false}
"""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of digit scenes for all tests."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 steps in three epochs that take seconds."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def make_config(recipe: Path, scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """The tiny recipe with its runs in this test's folder, and overrides on top."""

    def make(*overrides: str) -> Config:
        places = (f"run.output={tmp_path / 'runs'}", f"data.digit_scenes.root={scenes}")
        return load_config(recipe, [*places, *overrides])

    return make
