import pytest

from d3etr.config.training import ScheduleConfig
from d3etr.engine.optimiser import distillation_scale, learning_rate_factor


def factors(steps: int, config: ScheduleConfig) -> list[float]:
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


def test_constant_rate_is_constant() -> None:
    assert factors(4, ScheduleConfig(kind="constant")) == [1.0] * 4


def test_step_schedule_divides_by_ten_after_the_configured_share() -> None:
    assert factors(5, ScheduleConfig(kind="step", drop_at=0.6)) == [1, 1, 1, 0.1, 0.1]


def test_cosine_falls_from_one_to_the_final_factor_at_the_last_step() -> None:
    values = factors(5, ScheduleConfig(kind="cosine", final_factor=0.2))
    assert values == pytest.approx([1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_warmup_grows_linearly_and_then_hands_over() -> None:
    values = factors(6, ScheduleConfig(kind="cosine", warmup_steps=4, final_factor=0.5))
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5])


def test_distillation_grows_from_nothing_to_its_weight() -> None:
    assert [distillation_scale(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert distillation_scale(0, 0) == 1.0
