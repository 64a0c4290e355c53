"""What ``import d3etr`` offers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import d3etr
from d3etr.config.overrides import as_overrides
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


SHARED: dict[str, Any] = {}
SHARED["data"] = SHARED


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"recipe": None}, "recipe is None; expected a path"),
        ({"recipe": 3}, "recipe is 3"),
        ({"recipe": ""}, "recipe is ''"),
        ({"recipe": b"a.yaml"}, "recipe is a bytes"),
        ({"recipe": {"run": {}}}, "recipe is a dict"),
        ({"recipe": "https://host.invalid/a.yaml"}, "recipe is the URL"),
        ({"recipe": "none.yaml"}, "none.yaml"),
        ({"recipe": "."}, "folder|directory"),
        ({"launcher": "rey"}, "launcher is 'rey'; did you mean 'ray'"),
        ({"launcher": None}, "launcher is None; expected ray or local or torchrun"),
        ({"quiet": "yes"}, "quiet is 'yes'; expected True or False"),
        ({"optimisation": {"steps": torch.zeros(2)}}, "optimisation.steps: found a Tensor"),
        ({"optimisation": {"steps": {1, 2}}}, "optimisation.steps: found"),
        ({"optimisation": {"steps": 10**5000}}, "optimisation.steps: found"),
        ({"optimisation": {"steps": float("nan")}}, "optimisation.steps: found"),
        ({"optimisation": 3}, "optimisation: found 3"),
        ({"optimisation": lambda: 3}, "optimisation: found a function"),
        ({"run.seed": object()}, "run.seed: found an object"),
        (SHARED, "contain themselves"),
        ({"trainer": {}}, "trainer"),
    ],
)
def test_train_judges_every_argument_before_anything_starts(
    arguments: dict[str, Any],
    text: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = repository / "trainers" / "recipes" / "digits" / "plain.yaml"
    with pytest.raises(UserError, match=text):
        d3etr.train(**{"recipe": recipe, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_overrides_may_hold_numbers_of_numpy_and_paths() -> None:
    changes = {"optimisation": {"steps": np.int64(3), "learning_rate": np.float64(0.5)}}
    changes |= {"run": {"output": Path("runs")}, "data.sides": (np.int32(1), 2)}
    assert as_overrides(changes) == [
        "optimisation.steps=3",
        "optimisation.learning_rate=0.5",
        "run.output=runs",
        "data.sides=- 1\n- 2",
    ]


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
