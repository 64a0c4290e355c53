"""Sections whose class depends on one of their keys: detectors, methods."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MethodConfig
from d3etr.config.load import load_config, to_yaml

BASE = [
    "teacher.weights=t.safetensors",
    "optimisation.steps=3",
    "data.train={images: a, annotations: b}",
    "data.validation={images: c, annotations: d}",
]


@pytest.mark.parametrize("name", DetectorConfig.registry.names)
def test_a_detectors_section_has_its_own_class(name: str) -> None:
    config = DetectorConfig.parse({"name": name})
    assert type(config).__module__ == f"d3etr.detectors.{name}"
    assert DetectorConfig.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", MethodConfig.registry.names)
def test_a_methods_section_has_its_own_class(name: str) -> None:
    config = MethodConfig.parse({"method": name})
    assert type(config).__module__ == f"d3etr.methods.{name}"
    without = set(config.without_effect)
    assert MethodConfig.parse(config.model_dump(mode="json", exclude=without)) == config


def test_a_detector_that_version_0_1_wrote_is_read() -> None:
    others = {"levels": 4, "points": 4, "box_refinement": False, "classification": "sigmoid"}
    config = DetectorConfig.parse({"name": "dab_detr", "grid_temperature": 10.0, **others})
    assert config == DetectorConfig.parse({"name": "dab_detr", "grid_temperature": 10.0})


def test_a_method_that_version_0_1_wrote_is_read() -> None:
    """It wrote what a method implied as if it had been set."""
    old = {
        "method": "kd_detr",
        "adaptive_ratio": 0.0,
        "features": {"weight": 0.0, "queries": 100},
        "general_points": {"count": 16, "weight": 1.0},
    }
    new = {"method": "kd_detr", "general_points": {"count": 16}}
    assert MethodConfig.parse(old) == MethodConfig.parse(new)
    points = {"count": 0, "weight": 1.0}
    old = {"method": "detrdistill", "adaptive_ratio": 1.0, "general_points": points}
    assert MethodConfig.parse(old) == MethodConfig.parse({"method": "detrdistill"})


def test_every_problem_of_a_variant_is_named_at_once() -> None:
    settings = {"name": "detr", "levels": 2, "heads": 0, "unused_outputs": "x"}
    with pytest.raises(ValidationError) as caught:
        DetectorConfig.parse(settings)
    places = {detail["loc"] for detail in caught.value.errors()}
    assert places == {("levels",), ("heads",), ("unused_outputs",)}


def test_keys_that_another_variant_has_are_refused_with_its_name(tmp_path: Path) -> None:
    sets = [*BASE, "distillation.method=kd_detr", "distillation.adaptive_ratio=0.5"]
    with pytest.raises(Exception, match=r"distillation.adaptive_ratio: has no effect on method "):
        load_config(None, sets)


@pytest.mark.parametrize("method", ["d3etr", "kd_detr", "detrdistill"])
def test_a_resolved_configuration_loads_to_an_equal_one(tmp_path: Path, method: str) -> None:
    config = load_config(None, [*BASE, f"distillation.method={method}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
