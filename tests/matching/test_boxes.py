"""Generalised IoU against torchvision, and where torchvision's is not safe."""

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from d3etr.matching.boxes import (
    cxcywh_to_xyxy,
    generalised_iou,
    pairwise_generalised_iou,
)


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    boxes[..., 2:] = boxes[..., 2:] * 0.5 + 0.01
    return boxes


def test_corners_are_half_a_side_from_the_centre() -> None:
    corners = cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6]))
    assert torch.allclose(corners, torch.tensor([0.4, 0.1, 0.6, 0.7]))


def test_pairwise_equals_torchvision() -> None:
    first, second = cxcywh_to_xyxy(random_boxes(20)), cxcywh_to_xyxy(random_boxes(30, seed=1))
    expected = generalized_box_iou(first, second)
    assert torch.allclose(pairwise_generalised_iou(first, second), expected, atol=1e-6)


def test_equal_boxes_of_any_size_have_giou_one() -> None:
    for side in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        box = torch.tensor([0.5, 0.5, side, side])
        corners = cxcywh_to_xyxy(box)
        assert generalised_iou(corners, corners).item() == 1.0


def test_zero_size_boxes_have_finite_losses_and_gradients() -> None:
    boxes = torch.tensor(
        [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.1, 0.1, 0.1, 0.1]], requires_grad=True
    )
    others = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.9, 0.9, 0.0, 0.0]])
    overlap = generalised_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others))
    overlap.sum().backward()
    assert torch.isfinite(overlap).all()
    assert boxes.grad is not None and torch.isfinite(boxes.grad).all()


def test_nan_boxes_stay_nan() -> None:
    boxes = torch.full((4,), float("nan"))
    assert generalised_iou(boxes, torch.tensor([0.1, 0.1, 0.2, 0.2])).isnan()


def test_gradient_matches_finite_differences() -> None:
    boxes = cxcywh_to_xyxy(random_boxes(5)).requires_grad_(True)
    others = cxcywh_to_xyxy(random_boxes(5, seed=3))
    assert torch.autograd.gradcheck(lambda b: generalised_iou(b, others), (boxes,))
