"""Tiny runs for tests of launching."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from d3etr.config.load import load_config
from d3etr.config.tree import Config


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of digit scenes for all tests."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 steps in three epochs that take seconds."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(tiny_recipe())
    return file


@pytest.fixture
def make_config(recipe: Path, scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """The tiny recipe with its runs in this test's folder, and overrides on top."""

    def make(*overrides: str) -> Config:
        places = (f"run.output={tmp_path / 'runs'}", f"data.digit_scenes.root={scenes}")
        return load_config(recipe, [*places, *overrides])

    return make
