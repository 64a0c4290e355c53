"""Keys of earlier versions are read, with a warning that names today's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from d3etr.config import renamed
from d3etr.config.load import config_digest, load_config, to_yaml
from d3etr.config.problems import ConfigError, all_paths
from d3etr.config.renamed import EARLIER_KEYS, Renamed, with_current_keys
from d3etr.config.tree import Config

LENGTH = ("data.digit_scenes={}", "optimisation.steps=10")
TEACHER = ("teacher.weights=teacher.safetensors", "distillation.method=d3etr")


@pytest.fixture(autouse=True)
def every_warning() -> Iterator[None]:
    """As in a new process: each text is logged once."""
    renamed._warn_once.cache_clear()
    yield


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that were renamed in every way there is."""

    def per_head(value: object, _: object) -> object:
        return {"one_by_one": "per_head"}.get(str(value), value)

    table = {
        "student.detector.looks": "student.detector.cross_attention_init",
        "student.sight": "student.detector.cross_attention_init",
        "distillation.self_attention.heads": Renamed("distillation.self_attention.heads", per_head),
        "run.colour": None,
    }
    monkeypatch.setattr(renamed, "EARLIER_KEYS", table)


def test_a_key_without_effect_is_left_out_of_recipes_and_stored_configurations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    today = load_config(None, [*LENGTH, *TEACHER])
    stored = to_yaml(today).replace("teacher:\n", "teacher:\n  cache_gigabytes: 2.0\n")
    assert "cache_gigabytes: 2.0" in stored
    (tmp_path / "config.yaml").write_text(stored)
    found = load_config(tmp_path / "config.yaml", ["teacher.cache_gigabytes=null"])
    assert found == today and config_digest(found) == config_digest(today)
    load_config(tmp_path / "config.yaml")
    assert caplog.text.count("teacher.cache_gigabytes has no effect any more: remove it") == 1


def test_absolute_learning_rates_become_factors(caplog: pytest.LogCaptureFixture) -> None:
    rates = "{steps: 10, learning_rate: 2.0e-4, backbone_learning_rate: 2.0e-5}"
    overrides = ["data.digit_scenes={}", f"optimisation={rates}"]
    found = load_config(None, [*overrides, "optimisation.sampling_learning_rate=null"])
    assert found.optimisation.backbone_rate_factor == 0.1
    assert found.optimisation.sampling_rate_factor == 1.0
    assert "optimisation.backbone_learning_rate is now backbone_rate_factor: 0.1" in caplog.text
    assert "sampling_learning_rate" not in caplog.text


def test_a_rate_that_cannot_be_converted_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"set backbone_rate_factor, a factor on learning_rate"):
        load_config(None, [*LENGTH, "optimisation.backbone_learning_rate=fast"])


def test_a_key_in_both_forms_is_refused() -> None:
    both = "{steps: 1, backbone_learning_rate: 1e-5, backbone_rate_factor: 1.0}"
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.digit_scenes={}", f"optimisation={both}"])
    [problem] = caught.value.problems
    assert problem.path == "optimisation.backbone_learning_rate"
    assert "is the older name of backbone_rate_factor: set only backbone_rate_factor" in str(
        problem
    )


@pytest.mark.usefixtures("earlier")
def test_names_places_and_values_are_carried_over(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("student.detector.looks", "student.sight"):
        found = load_config(None, [*LENGTH, f"{key}=reference_prior"])
        assert found.student.detector.cross_attention_init == "reference_prior"
    assert "student.detector.looks is now cross_attention_init: reference_prior" in caplog.text
    assert (
        "student.sight is now student.detector.cross_attention_init: reference_prior" in caplog.text
    )
    tree = {"self_attention": {"heads": "one_by_one", "weight": 1.0}}
    changed, problems = with_current_keys(tree, "distillation")
    assert changed == {"self_attention": {"heads": "per_head", "weight": 1.0}} and not problems
    assert tree["self_attention"]["heads"] == "one_by_one"
    assert with_current_keys(changed, "distillation")[0] == changed
    assert caplog.text.count("distillation.self_attention.heads is now heads: per_head") == 1


@pytest.mark.usefixtures("earlier")
def test_a_section_alone_has_only_its_own_earlier_keys() -> None:
    assert with_current_keys({"looks": "random"}, "student.detector")[0] == {
        "cross_attention_init": "random"
    }
    assert with_current_keys({"looks": "random"}, "data")[0] == {"looks": "random"}
    assert with_current_keys({"run": 3, "student": {"detector": None}})[0] == {
        "run": 3,
        "student": {"detector": None},
    }


def test_earlier_keys_are_gone_and_todays_exist() -> None:
    paths = {*all_paths(Config)}
    for earlier, change in EARLIER_KEYS.items():
        key = change.key if isinstance(change, Renamed) else change
        assert key is None or key in paths
        assert earlier == key or earlier not in paths


def test_yesterdays_words_mean_todays(caplog: pytest.LogCaptureFixture) -> None:
    old = load_config(
        None,
        [
            *LENGTH,
            *TEACHER,
            "student.detector.first_looks=reference",
            "distillation.self_attention={heads: averaged}",
            "distillation.cross_attention.heads=apart",
        ],
    )
    today = load_config(
        None,
        [
            *LENGTH,
            *TEACHER,
            "student.detector.cross_attention_init=reference_prior",
            "distillation.self_attention={heads: mean}",
        ],
    )
    assert old == today
    assert (
        "student.detector.first_looks is now cross_attention_init: reference_prior" in caplog.text
    )
    assert "distillation.self_attention.heads is now heads: mean" in caplog.text


def test_a_file_that_no_person_writes_is_read_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed, _ = with_current_keys({"first_looks": "anywhere"}, "student.detector", warn=False)
    assert changed == {"cross_attention_init": "random"} and not caplog.records
