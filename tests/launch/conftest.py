"""Tiny runs and sweeps for tests of launching."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from sweep_runs import MakePlan
from tiny_recipe import tiny_recipe

from d3etr.config.load import load_config
from d3etr.config.sweep import load_sweep
from d3etr.config.tree import Config
from d3etr.launch.sweeps.plan import Plan, make_plan


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


@pytest.fixture
def make_plan_of(tmp_path: Path, recipe: Path, scenes: Path) -> MakePlan:
    """A sweep over the tiny recipe in this test's folder; keyword arguments are its keys."""

    def make(*overrides: str, **keys: Any) -> Plan:
        places = [f"run.output={tmp_path / 'runs'}", f"data.digit_scenes.root={scenes}"]
        tree = {"name": "tried", "recipe": str(recipe), "set": places, **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return make_plan(load_sweep(path, overrides))

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray for all sweeps of a file."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
