from typing import Any

import pytest

from d3etr.config.training import ScheduleConfig
from d3etr.engine.optimiser import distillation_scale, learning_rate_factor


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "constant"}, [1.0] * 4),
        ({"kind": "step", "drop_at": 0.6}, [1, 1, 1, 0.1, 0.1]),
        ({"kind": "cosine", "final_factor": 0.2}, [1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
        (
            {"kind": "cosine", "warmup_steps": 4, "final_factor": 0.5},
            [0.25, 0.5, 0.75, 1.0, 1.0, 0.5],
        ),
    ],
    ids=["constant", "divided by ten after a share", "down to the final factor", "warm-up"],
)
def test_the_factor_over_steps(settings: dict[str, Any], expected: list[float]) -> None:
    config, steps = ScheduleConfig(**settings), len(expected)
    found = [learning_rate_factor(step, steps, config) for step in range(steps)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "key", "value", "only"),
    [
        ("cosine", "drop_at", 0.5, "step"),
        ("constant", "drop_at", 0.5, "step"),
        ("step", "final_factor", 0.5, "cosine"),
        ("constant", "final_factor", 0.5, "cosine"),
    ],
)
def test_a_key_of_another_kind_is_refused(kind: str, key: str, value: float, only: str) -> None:
    expected = f"{key} 0.5 has no effect on kind '{kind}', only on '{only}'"
    with pytest.raises(ValueError, match=expected):
        ScheduleConfig.model_validate({"kind": kind, key: value})


def test_distillation_grows_from_nothing_to_its_weight() -> None:
    assert [distillation_scale(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert distillation_scale(0, 0) == 1.0
