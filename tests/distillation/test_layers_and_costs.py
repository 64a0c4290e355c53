"""Layer maps, prediction losses and matching costs against plain definitions."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from d3etr.config.distillation import MatchingCostConfig, PredictionConfig
from d3etr.errors import UserError
from d3etr.losses.prediction import class_loss
from d3etr.matching.boxes import cxcywh_to_xyxy, generalised_iou
from d3etr.methods.adaptive import AdaptiveMatching, kept_pairs
from d3etr.methods.selection import teacher_layers
from d3etr.structures import DecoderOutputs


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (3, 6, [1, 3, 5]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 6, [5]),
        (4, 6, [1, 2, 4, 5]),
    ],
)
def test_uniform_layer_map(student: int, teacher: int, expected: list[int]) -> None:
    assert teacher_layers("uniform", student, teacher) == expected


def test_last_layer_map() -> None:
    assert teacher_layers("last", 3, 6) == [5, 5, 5]


def test_explicit_layer_map_must_end_with_the_last() -> None:
    assert teacher_layers((0, 2), 2, 3) == [0, 2]
    with pytest.raises(UserError, match="the last being 2"):
        teacher_layers((0, 1), 2, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "ratio", "kept"),
    [(16, 16, 1.0, 16), (10, 16, 1.0, 10), (16, 10, 0.5, 5), (3, 3, 0.01, 1), (100, 100, 0.07, 7)],
)
def test_kept_pairs(student: int, teacher: int, ratio: float, kept: int) -> None:
    assert kept_pairs(student, teacher, ratio) == kept


def test_focal_class_loss_equals_its_definition() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = student.sigmoid(), teacher.sigmoid()
    expected = ((q - p) ** 2 * binary_cross_entropy(p, q, reduction="none")).sum(-1)
    assert torch.allclose(class_loss(student, teacher, PredictionConfig()), expected, atol=1e-6)


def test_kl_class_loss_has_gradients_of_the_same_size_at_any_temperature() -> None:
    student, teacher = torch.randn(64, 4) * 0.1, torch.randn(64, 4) * 0.1
    sizes = []
    for temperature in (5.0, 50.0):
        logits = student.clone().requires_grad_(True)
        config = PredictionConfig(class_loss="kl", temperature=temperature)
        class_loss(logits, teacher, config).sum().backward()
        assert logits.grad is not None
        sizes.append(logits.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("distance", ["l2", "bce"])
def test_adaptive_cost_equals_its_definition(distance: str) -> None:
    torch.manual_seed(0)
    student = DecoderOutputs(torch.randn(2, 1, 5, 3), torch.rand(2, 1, 5, 4))
    teacher = DecoderOutputs(torch.randn(2, 1, 4, 3), torch.rand(2, 1, 4, 4))
    config = MatchingCostConfig.model_validate({"class_distance": distance})
    costs = AdaptiveMatching(config, 1.0, 5).problem(student, teacher).costs
    assert costs.shape == (2, 1, 5, 4)
    for layer, i, j in ((0, 0, 0), (1, 4, 3), (1, 2, 1)):
        p = student.logits[layer, 0, i].sigmoid()
        q = teacher.logits[layer, 0, j].sigmoid()
        classes = (
            (p - q).norm() if distance == "l2" else binary_cross_entropy(p, q, reduction="sum")
        )
        mine, other = student.boxes_cxcywh[layer, 0, i], teacher.boxes_cxcywh[layer, 0, j]
        overlap = generalised_iou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(other))
        expected = 2 * classes + 5 * (mine - other).abs().sum() + 2 * (1 - overlap)
        assert costs[layer, 0, i, j].item() == pytest.approx(expected.item(), rel=1e-4)
