"""A distilled step whose attention maps kernels compare, and a CPU does."""

import pytest
import torch
from tiny import tiny_detector_config

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _detector(name: str, seed: int, **changes: object) -> DetectionTransformer:
    torch.manual_seed(seed)
    settings = {"name": name, "width": 32, "heads": 2, "feedforward": 32, "queries": 6}
    detector = build_detector(tiny_detector_config(**(settings | changes)), 3)
    for key, parameter in detector.named_parameters():
        if "head" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return detector.eval().to(DEVICE)


def _batch() -> tuple[ImageBatch, Targets]:
    torch.manual_seed(5)
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, :, 32:] = True
    pixels = torch.randn(2, 3, 64, 64) * ~padding[:, None]
    boxes = torch.rand(2, 3, 4) * 0.4 + 0.2
    labels = torch.tensor([[0, 2, 1], [1, 0, 0]])
    targets = Targets(labels, boxes, (3, 1), (1, 2), ((64, 64), (64, 32)), torch.tensor([3, 1]))
    return ImageBatch(pixels, padding).to(DEVICE), targets.to(DEVICE)


def _step(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a step with fewer pairs than queries."""
    student, teacher = _detector(name, 0), _detector(name, 1, queries=8, decoder_layers=3)
    settings = {"method": "d3etr", "matched_pair_ratio": 0.7, "teacher_query_ratio": 0.6}
    config = MethodConfig.parse(settings)
    distiller = Distiller(student, teacher, config, SetCriterionConfig(), seed=0).to(DEVICE)
    images, targets = _batch()
    taught = distiller.run_teacher(images)
    losses = distiller(images, targets, taught, distiller.normalisers(targets, taught))
    torch.stack([*losses.values()]).sum().backward()
    gradients = {k: p.grad for k, p in distiller.named_parameters() if p.grad is not None}
    return losses, gradients


@pytest.mark.parametrize("name", ["conditional_detr", "dab_detr", "detr", "deformable_detr"])
def test_losses_and_gradients_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for runs in (False, True):
        monkeypatch.setattr("d3etr.losses.attention.runs_kernels", lambda _, runs=runs: runs)
        with torch.backends.cudnn.flags(allow_tf32=False):
            found = _step(name)
        if runs:
            unstored, gradients = found
        else:
            stored, expected = found
    assert unstored.keys() == stored.keys() and "fixed/self_attention" in unstored
    for key, loss in stored.items():
        torch.testing.assert_close(unstored[key], loss, rtol=1e-5, atol=1e-6, msg=key)
    for key, gradient in expected.items():
        error = (gradients[key] - gradient).norm()
        assert error < 1e-3 * gradient.norm() + 1e-5, key
