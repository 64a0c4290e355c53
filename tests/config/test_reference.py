"""The reference of all keys: complete, current, and what editors check recipes with."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from d3etr.cli.main import main
from d3etr.config import reference
from d3etr.config.base import Section
from d3etr.config.data import FilePath
from d3etr.config.load import load_config, plain_tree, read_recipe
from d3etr.config.problems import all_paths
from d3etr.config.reference import all_keys, find_keys
from d3etr.config.reference_pages import PAGE, SCHEMA, markdown, schema
from d3etr.config.tree import Config
from d3etr.config.variants import VariantSection
from d3etr.errors import UserError

REGENERATE = "run: d3etr explain --write docs"


def test_the_page_and_the_schema_are_current(repository: Path) -> None:
    for name, text in ((PAGE, markdown()), (SCHEMA, schema())):
        assert (repository / "docs" / name).read_text() == text, REGENERATE


def test_every_key_is_there_and_described() -> None:
    keys = all_keys()
    assert {key.path for key in keys} == {*all_paths(Config)}
    assert not [key.path for key in keys if len(key.description) < 5]
    assert not [key.path for key in keys if "None" in key.description]


@pytest.mark.parametrize(
    ("path", "values", "unit", "default"),
    [
        ("optimisation.learning_rate", "number, above 0", None, "`0.0001`"),
        ("optimisation.steps", "whole number, at least 1, or null", "optimiser steps", "`null`"),
        ("optimisation.precision", "`float32` or `bfloat16`", None, "`float32`"),
        ("optimisation.schedule.drop_at", "number, above 0 and below 1", None, "`0.8`"),
        ("data.preprocessing.longest_side", "whole number, 16 to 65,536, or null", "pixels", None),
        ("data.train.annotations", "path or URL", None, "must be set"),
        ("run.output", "path", None, "`runs`"),
        ("student.detector.backbone.stage_widths", None, "channels", "`[24, 48, 64]`"),
        ("cluster.gpus_per_worker", "number, at least 0, or `auto`", None, "`auto`"),
        ("student.backbone_weights", "`imagenet`, or path or URL, or null", None, "`null`"),
    ],
)
def test_values_units_and_defaults_are_in_words(
    path: str, values: str | None, unit: str | None, default: str | None
) -> None:
    [key] = find_keys(path)
    assert values in (None, key.values) and default in (None, key.default)
    assert key.unit == unit


def test_a_key_of_one_detector_names_it() -> None:
    [refinement] = find_keys("student.detector.box_refinement")
    assert refinement.belongs_to == "only detector `deformable_detr`"
    [width] = find_keys("student.detector.width")
    assert width.belongs_to == ""
    [name] = find_keys("student.detector.name")
    assert "`dab_detr`" in name.values


class Inner(Section):
    """Something within."""

    weight: float = 1.0
    """How much it counts."""


class Kind(VariantSection):
    """One of several."""

    default_variant: ClassVar = "one"
    variant_key: ClassVar = "kind"
    registry: ClassVar[Any]
    kind: str
    shared: int = 3
    """Of all kinds."""


class One(Kind):
    """The first."""

    kind: Literal["one"] = "one"
    inner: Inner = Inner()


class Two(Kind):
    """The second: another default within a section, another meaning of a key."""

    kind: Literal["two"] = "two"
    shared: int = 4
    """Of all kinds."""
    inner: Inner = Inner(weight=2.0)
    place: FilePath = Path("here")
    """Where it is."""


class Kinds:
    """A registry of these two."""

    kind, names = "kind of thing", ("one", "two")

    def find(self, name: str) -> Any:
        return type("Thing", (), {"config_class": {"one": One, "two": Two}[name]})


Kind.registry = Kinds()


def test_variants_are_walked_and_what_differs_between_them_is_named() -> None:
    found = {key.path: key for key in reference._keys(Kind, "x.", None)}
    assert [*found] == ["x.kind", "x.shared", "x.inner", "x.inner.weight", "x.place"]
    assert found["x.kind"].values == "`one` or `two`"
    assert found["x.shared"].default == "`3` (one), `4` (two)"
    assert found["x.inner"].is_section and found["x.inner"].description == "Something within."
    assert found["x.inner.weight"].default == "`1.0` (one), `2.0` (two)"
    assert found["x.place"].belongs_to == "only kind of thing `two`"


def check(value: Any, allowed: dict[str, Any], path: str = "") -> None:
    """As an editor does, for the few words of JSON Schema that are used."""
    if "anyOf" in allowed:
        for one in allowed["anyOf"]:
            try:
                return check(value, one, path)
            except AssertionError:
                continue
        raise AssertionError(path)
    if "enum" in allowed:
        assert value in allowed["enum"], path
        return
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer"}
    kind = "null" if value is None else names.get(type(value), "number")
    kinds = allowed["type"] if isinstance(allowed["type"], list) else [allowed["type"]]
    assert kind in kinds or (kind == "integer" and "number" in kinds), (path, value)
    if isinstance(value, dict) and "properties" in allowed:
        for name, inner in value.items():
            assert name in allowed["properties"], f"{path}.{name}"
            check(inner, allowed["properties"][name], f"{path}.{name}")
    for index, inner in enumerate(value if isinstance(value, list) else ()):
        places = allowed.get("prefixItems", ())
        check(inner, places[index] if index < len(places) else allowed["items"], path)
    if kind in ("integer", "number"):
        assert allowed.get("minimum", value) <= value <= allowed.get("maximum", value), path


def test_the_schema_takes_every_shipped_recipe_and_every_resolved_one(repository: Path) -> None:
    allowed = json.loads(schema())
    recipes = sorted((repository / "trainers" / "recipes").rglob("*.yaml"))
    assert len(recipes) > 10
    for recipe in recipes:
        check(read_recipe(recipe), allowed)
    config = load_config(None, ["data.digit_scenes={}", "optimisation.steps=1"])
    check(plain_tree(config), allowed)
    for slip in ({"run": {"sede": 1}}, {"run": {"seed": -1}}, {"run": {"role": "tutor"}}):
        with pytest.raises(AssertionError):
            check(slip, allowed)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["explain", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_explain_shows_a_key_a_section_or_all_sections(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "adaptive_ratio")
    assert text.startswith("distillation.adaptive_ratio\n  r: L = r * L_adaptive")
    assert "values      number, 0 to 1" in text and "`" not in text
    assert "belongs to  only detector deformable_detr" in said(capsys, "detector.two_stage")
    assert "warmup_steps" in said(capsys, "optimisation.schedule")
    assert "optimisation.schedule" in said(capsys)
    assert "run.seed\n" in said(capsys, "seed") and "data.digit_scenes.seed" in said(capsys, "seed")
    [found] = json.loads(said(capsys, "run.seed", "--json"))
    assert found["key"] == "run.seed" and found["default"] == "0"


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("optimisation.learning_rat", "did you mean 'optimisation.learning_rate'?"),
        ("lerning_rate", "did you mean 'optimisation.learning_rate'?"),
        ("qqqqqq", "'d3etr explain' lists the sections"),
        ("teacher.cache_gigabytes", "a key of an earlier version: it has no effect any more"),
        ("optimisation.backbone_learning_rate", "is 'optimisation.backbone_rate_factor' today"),
    ],
)
def test_a_slip_names_the_nearest_key(
    wanted: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in said(capsys, wanted, code=2)
    with pytest.raises(UserError):
        find_keys(wanted)


def test_explain_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    assert str(tmp_path / "new" / PAGE) in said(capsys, "--write", str(tmp_path / "new"))
    for name in (PAGE, SCHEMA):
        assert (tmp_path / "new" / name).read_text() == (repository / "docs" / name).read_text()
    assert "leave KEY out" in said(capsys, "run", "--write", str(tmp_path), code=2)
    (tmp_path / "file").write_text("")
    assert "cannot write" in said(capsys, "--write", str(tmp_path / "file"), code=2)
