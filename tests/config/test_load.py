"""Recipes, --set, the round trip to YAML and the digest."""

from pathlib import Path
from typing import Any

import pytest

from d3etr.config.load import config_digest, load_config, to_yaml
from d3etr.config.overrides import apply_overrides, as_overrides
from d3etr.config.problems import ConfigError
from d3etr.config.tree import Config

MINIMAL = "data: {digit_scenes: {}}\noptimisation: {steps: 10}\n"
TEACHER = ("teacher.weights=teacher.safetensors", "distillation.method=d3etr")


def recipe(folder: Path, text: str = MINIMAL, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def minimal(*overrides: str) -> Config:
    return load_config(None, ["data.digit_scenes={}", "optimisation.steps=10", *overrides])


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_recipe_holds_what_it_says_and_defaults_elsewhere(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path))
    assert config.optimisation.steps == 10
    assert config.run.name == "run"


def test_a_softmax_student_has_detrs_weights_of_the_class_term_unless_they_are_set() -> None:
    softmax = ("student.detector.name=detr", "student.detector.classification=softmax")
    for overrides, expected in (
        ((), (2.0, 2.0)),
        (softmax, (1.0, 1.0)),
        ((*softmax, "optimisation.set_criterion.class_weight=3"), (3.0, 1.0)),
    ):
        config = minimal(*overrides)
        criterion = config.optimisation.set_criterion
        assert (criterion.class_weight, criterion.class_cost) == expected
        settings = config.model_dump(exclude={"distillation"})
        assert Config.model_validate(settings) == config


def test_a_detector_names_the_class_loss_of_its_students(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"class_loss": "varifocal", "class_weight": 1.0}
    kind = type(minimal().student.detector)
    monkeypatch.setattr(kind, "criterion_defaults", property(lambda self: defaults))
    alpha = "optimisation.set_criterion.quality_alpha=0.5"
    criterion = minimal(alpha).optimisation.set_criterion
    assert (criterion.class_loss, criterion.class_weight) == ("varifocal", 1.0)
    assert criterion.quality_parameters == (0.5, 2.0)
    focal = "optimisation.set_criterion.class_loss=focal"
    assert minimal(focal).optimisation.set_criterion.class_loss == "focal"
    assert "quality_alpha has no effect with class_loss 'focal'" in refusal(
        None, "data.digit_scenes={}", "optimisation.steps=10", focal, alpha
    )


def test_a_d_fine_learns_as_published_unless_told_otherwise() -> None:
    kind, key = "student.detector.name=d_fine", "optimisation.set_criterion"
    criterion = minimal(kind).optimisation.set_criterion
    assert (criterion.class_loss, criterion.class_weight) == ("varifocal", 1.0)
    assert (criterion.fgl_weight, criterion.ddf_weight) == (0.15, 1.5)
    assert criterion.union_matching
    settings = ("class_loss=mal", "union_matching=false", "fgl_weight=0.3", "ddf_weight=0")
    criterion = minimal(kind, *(f"{key}.{one}" for one in settings)).optimisation.set_criterion
    assert criterion.class_loss == "mal" and not criterion.union_matching
    assert (criterion.fgl_weight, criterion.ddf_weight) == (0.3, 0.0)


def test_lists_become_tuples_and_text_becomes_paths() -> None:
    config = minimal(
        "student.detector.backbone.stage_widths=[8, 16]", "student.backbone_weights=a/b.safetensors"
    )
    assert config.student.detector.backbone.stage_widths == (8, 16)
    assert config.student.backbone_weights == Path("a/b.safetensors")


def test_imagenet_stays_a_name_where_paths_are_allowed() -> None:
    weights = minimal("student.backbone_weights=imagenet").student.backbone_weights
    assert str(weights) == "imagenet"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-04", ".0001"])
def test_numbers_are_read_in_every_spelling(text: str) -> None:
    rate = minimal(f"optimisation.learning_rate={text}").optimisation.learning_rate
    assert rate == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["no", "on", "2024-01-01", "1.2.3"])
def test_names_that_older_yaml_converts_stay_text(name: str) -> None:
    assert minimal(f"run.name={name}").run.name == name


def test_set_wins_over_the_recipe_and_later_over_earlier(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    config = load_config(path, ["optimisation.steps=20", "optimisation.steps=30"])
    assert config.optimisation.steps == 30


def test_set_makes_a_section_that_is_null(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + "teacher: null\n")
    config = load_config(path, TEACHER)
    assert config.teacher is not None
    assert config.teacher.weights == Path("teacher.safetensors")


def test_set_can_switch_a_section_off(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + "teacher: {weights: a.safetensors}\n")
    assert load_config(path, ["teacher=null"]).teacher is None


def test_set_replaces_a_list_as_a_whole(tmp_path: Path) -> None:
    text = MINIMAL + "student: {detector: {backbone: {stage_widths: [8, 16, 24]}}}\n"
    config = load_config(recipe(tmp_path, text), ["student.detector.backbone.stage_widths=[32]"])
    assert config.student.detector.backbone.stage_widths == (32,)


def test_a_recipe_is_merged_over_what_it_extends(tmp_path: Path) -> None:
    recipe(tmp_path, MINIMAL + "run: {name: base, seed: 1}\n", "base.yaml")
    path = recipe(tmp_path, "extends: base.yaml\nrun: {seed: 2}\n")
    config = load_config(path)
    assert (config.run.name, config.run.seed) == ("base", 2)


def test_of_several_extended_recipes_the_later_wins(tmp_path: Path) -> None:
    recipe(tmp_path, MINIMAL + "run: {name: a, seed: 1}\n", "a.yaml")
    recipe(tmp_path, "run: {name: b}\n", "b.yaml")
    config = load_config(recipe(tmp_path, "extends: [a.yaml, b.yaml]\n"))
    assert (config.run.name, config.run.seed) == ("b", 1)


def test_extended_recipes_are_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    recipe(tmp_path, MINIMAL, "base.yaml")
    assert load_config(recipe(tmp_path / "sub", "extends: ../base.yaml\n")).data.digit_scenes


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: b.yaml\n", "a.yaml")
    recipe(tmp_path, "extends: a.yaml\n", "b.yaml")
    message = refusal(tmp_path / "a.yaml")
    assert "extends: goes in a circle: a.yaml -> b.yaml -> a.yaml" in message


VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "both": TEACHER,
    "adaptive only": (*TEACHER, "distillation.adaptive_ratio=1"),
    "fixed only": (*TEACHER, "distillation.adaptive_ratio=0"),
    "random auxiliary group": (
        *TEACHER,
        "distillation={method: d3etr, adaptive_ratio: 0, prediction: {weight: 0}, "
        "self_attention: {weight: 0}, cross_attention: {weight: 0}, "
        "auxiliary_group: {queries: random, assignment: own}}",
    ),
    "layer map": (*TEACHER, "distillation.layer_map=[0, 2]"),
    "temperature": (
        *TEACHER,
        "distillation.prediction={class_loss: kl, temperature: 2}",
    ),
    "small numbers and odd names": ("run.name='1e-4'", "optimisation.weight_decay=1e-12"),
    "own data": (
        "data={train: {images: a, annotations: b}, validation: {images: 'no', annotations: d}}",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_yaml_of_a_configuration_loads_to_the_same(tmp_path: Path, variant: str) -> None:
    config = minimal(*VARIANTS[variant])
    again = load_config(recipe(tmp_path, to_yaml(config)))
    assert again == config
    assert config_digest(again) == config_digest(config)


def test_yaml_holds_values_in_effect_that_nobody_set() -> None:
    text = to_yaml(minimal(*TEACHER, "distillation.adaptive_ratio=0"))
    assert "teacher_query_ratio: 1.0" in text
    assert "temperature: 1.0" in text
    assert "matched_pair_ratio" not in text, "without effect at adaptive_ratio 0"


@pytest.mark.parametrize(
    "change",
    [
        "run.name=other",
        "run.output=elsewhere",
        "run.keep_checkpoints=7",
        "cluster.workers=2",
        "tracking.enabled=false",
        "data.workers=0",
        "evaluation.every_steps=null",
    ],
)
def test_the_digest_ignores_where_and_how_fast(change: str) -> None:
    assert config_digest(minimal(change)) == config_digest(minimal())


@pytest.mark.parametrize(
    "change",
    [
        "run.seed=1",
        "optimisation.steps=11",
        "data.digit_scenes.seed=1",
        "student.detector.heads=4",
        "evaluation.every_steps=5",
    ],
)
def test_the_digest_changes_with_what_changes_results(change: str) -> None:
    assert config_digest(minimal(change)) != config_digest(minimal())


def test_the_digest_knows_no_defaults() -> None:
    """So that a setting which a later version adds leaves it as it is."""
    config = minimal()
    told_apart = set(config.student.detector.model_dump(exclude_defaults=True))
    assert "heads" not in told_apart
    spelled_out = minimal("student.detector.heads=8", "optimisation.clip_norm=0.1")
    assert config_digest(spelled_out) == config_digest(config)


def test_the_digest_is_eight_hex_digits() -> None:
    digest = config_digest(minimal())
    assert len(digest) == 8
    int(digest, 16)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/run #2", "/data/run #2"),
        (" /data/run #2 ", "/data/run #2"),
        ("'/data/run' #2", "/data/run"),
        ("3 #2", 3),
        ("null #2", None),
        ("[a, b] #2", ["a", "b"]),
        ("a word\n  and another", "a word and another"),
        ("'1e3'", "1e3"),
    ],
)
def test_plain_text_after_set_is_taken_whole(text: str, value: object) -> None:
    assert apply_overrides({}, [f"run.output={text}"]) == ({"run": {"output": value}}, [])


def test_text_that_reads_as_a_number_is_to_be_quoted() -> None:
    rest = ["optimisation.steps=1", "data.digit_scenes={}"]
    for override in ("run.name=1e3", "tracking.experiment=123"):
        with pytest.raises(ConfigError, match="expected text: quote what reads as a number"):
            load_config(None, [*rest, override])
    assert load_config(None, [*rest, "run.name='1e3'"]).run.name == "1e3"


def test_keyword_arguments_become_overrides() -> None:
    changes: dict[str, Any] = {
        "run": {"seed": 3, "name": "no", "output": Path("a b")},
        "student.detector.backbone.stage_widths": (8, 16),
        "optimisation": {"clip_norm": None, "learning_rate": 1e-5},
    }
    config = minimal(*as_overrides(changes))
    assert (config.run.seed, config.run.name, config.run.output) == (3, "no", Path("a b"))
    assert config.student.detector.backbone.stage_widths == (8, 16)
    assert config.optimisation.clip_norm is None
    assert config.optimisation.learning_rate == 1e-5


def test_twice_the_learning_rate_is_one_key() -> None:
    once, twice = (minimal(f"optimisation.learning_rate={rate}") for rate in (1e-3, 2e-3))
    assert once.optimisation.backbone_rate_factor == twice.optimisation.backbone_rate_factor
