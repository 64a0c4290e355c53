"""Settings of augmentation and of exact sizes that cannot work are refused, with the reason."""

import pytest

from d3etr.config.load import ConfigError, config_digest, load_config
from d3etr.config.tree import Config
from d3etr.data.judgement import judge_length

BASE = ("data.digit_scenes={}", "optimisation.steps=40", "optimisation.batch_size=4")
TEACHER = ("distillation.method=d3etr", "teacher={weights: a, views: {}}")
STRONG = ("data.augmentation.mosaic=0.5", "data.augmentation.off_for_last_epochs=2")
EXACT = ("data.preprocessing={exact_size: [640, 640], normalisation: unit}",)


def load(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (STRONG[1:], "off_for_last_epochs has no effect: photometric, zoom_out, iou_crop, mosaic"),
        ((*TEACHER, *STRONG), "teacher.views are as they were stored in all epochs"),
        (
            (*TEACHER, *EXACT, "data.augmentation.shortest_sides=[480, 640]"),
            "teacher.views have one size each, but with data.preprocessing.exact_size",
        ),
        (
            (*EXACT, "data.preprocessing.shortest_side=800"),
            "shortest_side would have no effect beside exact_size",
        ),
        (("data.preprocessing.exact_size=[640]",), "data.preprocessing.exact_size"),
    ],
)
def test_what_cannot_work_is_refused(overrides: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert text in str(caught.value)


def test_views_of_an_exact_size_and_of_mosaics_are_not() -> None:
    config = load(*TEACHER, *EXACT, STRONG[0])
    assert config.data.preprocessing.exact_size == (640, 640)
    assert config.data.preprocessing.longest_side is None


@pytest.mark.parametrize("length", ["optimisation.steps=40", "optimisation={epochs: 4}"])
def test_what_would_be_off_in_the_whole_run_is_refused(length: str) -> None:
    given = ["data.digit_scenes={}", *STRONG, length, "optimisation.batch_size=4"]
    config = load_config(None, given)
    assert judge_length(config, 40).errors == ()
    config = load_config(None, [*given, "data.augmentation.off_for_last_epochs=4"])
    [error] = judge_length(config, 40).errors
    assert "off_for_last_epochs (4) is all of the run (4 epochs)" in error


def test_settings_that_are_off_leave_a_runs_digest() -> None:
    off = ("data.augmentation.mosaic=0.0", "data.preprocessing.exact_size=null")
    assert config_digest(load()) == config_digest(load(*off))
    assert config_digest(load()) != config_digest(load(*EXACT))
