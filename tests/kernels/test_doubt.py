"""Costs that are not finite, where nobody looks at once: the loss says it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_detector_config
from torch.optim import AdamW

pytest.importorskip("triton")

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import Journal
from d3etr.engine.metric_logger import MetricLogger, TrainingDiverged
from d3etr.matching.assignment import CostBlock, DeviceSolving, Solver, Solving
from d3etr.structures import ImageBatch, Targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OnTheDevice(Solver):
    """Interprets the kernel where there is no GPU."""

    def __init__(self, spoilt: str = "") -> None:
        super().__init__()
        self.spoilt = spoilt

    def start(self, blocks: Sequence[CostBlock]) -> Solving:
        for block in blocks:
            if self.spoilt and self.spoilt in block.name:
                block.costs[0, 0, 0, 0] = float("inf")
        return DeviceSolving(blocks, None)


def detector(seed: int) -> DetectionTransformer:
    torch.manual_seed(seed)
    return build_detector(tiny_detector_config(), classes=3).eval()


def losses(solver: Solver) -> dict[str, torch.Tensor]:
    config = MethodConfig.parse({"method": "d3etr"})
    student, teacher = detector(0).to(DEVICE), detector(1).to(DEVICE)
    distiller = Distiller(student, teacher, config, SetCriterionConfig(), seed=0).to(DEVICE)
    distiller.supervision = replace(distiller.supervision, solver=solver)
    images = ImageBatch(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[[0.3, 0.3, 0.2, 0.2]], [[0.6, 0.6, 0.3, 0.3]]])
    targets = Targets(
        torch.tensor([[0], [2]]),
        boxes,
        (1, 1),
        (10, 11),
        ((32, 32),) * 2,
        torch.ones(2, dtype=torch.int64),
    )
    images, targets = images.to(DEVICE), targets.to(DEVICE)
    taught = distiller.run_teacher(images)
    found: dict[str, torch.Tensor] = distiller(
        images, targets, taught, distiller.normalisers(targets, taught), 0.0
    )
    return found


def test_the_device_changes_no_loss() -> None:
    for (name, here), there in zip(
        losses(OnTheDevice()).items(), losses(Solver(threads=0)).values(), strict=True
    ):
        assert torch.allclose(here, there), name


@pytest.mark.parametrize(
    ("spoilt", "loss"),
    [
        ("student queries against objects", "detection/class"),
        ("teacher queries against objects", "auxiliary/class"),
        ("student queries against teacher queries", "adaptive/class"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_loss_over_doubtful_pairs_names_step_and_images(
    spoilt: str, loss: str, tmp_path: Path
) -> None:
    found, optimiser = losses(OnTheDevice(spoilt)), AdamW([torch.ones(1)])
    window = MetricLogger(Journal(tmp_path, active=False), SingleProcess(DEVICE), optimiser)
    assert [name for name, value in found.items() if not value.isfinite()] == [loss]
    window.add(7, found, (10, 11))
    window.add_norm(torch.tensor(1.0))
    with pytest.raises(TrainingDiverged, match=f"{loss} became NaN .* step 7, image ids 10, 11"):
        window.write(8)
