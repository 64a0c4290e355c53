"""How often the host waits for the device in a step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import OptimisationConfig, SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.ema import WeightAverage
from d3etr.engine.journal import Journal
from d3etr.engine.metric_logger import MetricLogger
from d3etr.engine.optimiser import build_optimiser, clip_gradients
from d3etr.structures import ImageBatch, Targets

MakeDetector = Callable[..., DetectionTransformer]
MOST = 1


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Fills a list with what PyTorch says of each operation that makes the host wait."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [
            f"{warning.filename}:{warning.lineno}"
            for warning in caught
            if "synchronizing CUDA operation" in str(warning.message)
        ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_are_counted() -> None:
    number = torch.ones(1, device="cuda")
    with counted_waits() as waits:
        number.item()
    assert len(waits) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["none", "d3etr", "kd_detr", "detrdistill"])
def test_the_host_hardly_waits_in_a_step(
    method: str,
    any_detector: MakeDetector,
    images: ImageBatch,
    targets: Targets,
    tmp_path: Path,
) -> None:
    device = torch.device("cuda")
    student, teacher = any_detector(0).to(device), any_detector(1, decoder_layers=3).to(device)
    config = MethodConfig.parse({"method": method})
    known = None if method == "none" else teacher
    distiller = Distiller(student, known, config, SetCriterionConfig(), seed=0).to(device)
    optimiser = build_optimiser(distiller, student.backbone, OptimisationConfig(steps=1))
    average = WeightAverage(distiller, 0.9)
    window = MetricLogger(Journal(tmp_path, active=False), SingleProcess(device), optimiser)

    def step(number: int) -> None:
        batch, truth = images.to(device), targets.to(device)
        taught = distiller.run_teacher(batch, number)
        sums = distiller.normalisers(truth, taught)
        total = window.add(number, distiller(batch, truth, taught, sums), truth.image_ids)
        total.backward()  # type: ignore[no-untyped-call]
        window.add_norm(clip_gradients(optimiser, 0.1))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(number)

    step(0)
    with counted_waits() as waits:
        step(1)
    assert len(waits) <= MOST, "\n".join(waits)
