"""The kernel for costs of pairs against plain operations."""

import pytest
import torch

from d3etr.config.distillation import MatchingCostConfig
from d3etr.matching.costs import distillation_costs
from d3etr.structures import DecoderOutputs

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _outputs(queries: int, classes: int, seed: int) -> DecoderOutputs:
    """Random outputs, one box without a size among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 3, queries, classes, generator=generator)
    boxes = torch.rand(2, 3, queries, 4, generator=generator)
    boxes[..., 0, 2:] = 0
    return DecoderOutputs(logits.to(DEVICE), boxes.to(DEVICE))


@pytest.mark.parametrize(("rows", "columns", "classes"), [(5, 7, 3), (33, 65, 10), (1, 1, 1)])
@pytest.mark.parametrize("class_cost", [0.0, 2.0])
def test_costs_are_those_of_plain_operations(
    rows: int, columns: int, classes: int, class_cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = _outputs(rows, classes, 0), _outputs(columns, classes, 1)
    config = MatchingCostConfig(class_cost=class_cost, l1_cost=5.0, giou_cost=3.0)
    monkeypatch.setattr("d3etr.matching.costs.runs_kernels", lambda _: False)
    expected = distillation_costs(student, teacher, config)
    monkeypatch.setattr("d3etr.matching.costs.runs_kernels", lambda _: True)
    found = distillation_costs(student, teacher, config)
    assert found.shape == (2, 3, rows, columns)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_what_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3etr.matching.costs.runs_kernels", lambda _: True)
    student, teacher = _outputs(4, 3, 0), _outputs(4, 3, 1)
    student.boxes_cxcywh[0, 1, 2, 3] = float("nan")
    teacher.logits[1, 0, 3, 1] = float("nan")
    found = distillation_costs(student, teacher, MatchingCostConfig()).isnan()
    assert found[0, 1, 2].all() and found[1, 0, :, 3].all()
    assert found.sum() == 8
