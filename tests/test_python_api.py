"""What ``import d3etr`` offers."""

from pathlib import Path

import pytest

import d3etr
from d3etr.errors import UserError


def test_names_are_found_when_they_are_used(tiny_weights: Path) -> None:
    assert isinstance(d3etr.load(tiny_weights, device="cpu"), d3etr.Predictor)
    assert set(d3etr.__all__) <= set(dir(d3etr))
    for name in d3etr.__all__:
        assert callable(getattr(d3etr, name))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'd3etr' has no attribute 'fit'"):
        d3etr.fit  # noqa: B018


def test_train_checks_its_overrides_before_anything_starts(repository: Path) -> None:
    recipe = repository / "trainers" / "recipes" / "digits" / "plain.yaml"
    with pytest.raises(UserError, match="did you mean 'steps'"):
        d3etr.train(recipe, optimisation={"stepz": 3})


@pytest.mark.slow
def test_train_trains_a_recipe_with_sections_changed(tmp_path: Path, repository: Path) -> None:
    result = d3etr.train(
        repository / "trainers" / "recipes" / "digits" / "plain.yaml",
        launcher="local",
        quiet=True,
        run={"output": tmp_path / "runs"},
        data={
            "digit_scenes": {
                "root": tmp_path / "data",
                "train_images": 16,
                "validation_images": 4,
                "test_images": 4,
            }
        },
        student={"backbone_weights": None, "detector": {"width": 32, "heads": 2}},
        optimisation={"steps": 2, "schedule": {"warmup_steps": 1}},
        tracking={"enabled": False},
    )
    assert result.trained
    assert result.metrics["steps"] == 2
    assert result.weights.is_file()
