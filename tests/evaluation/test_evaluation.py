from dataclasses import dataclass, field

import pytest
import torch
from tiny_runs import DETECTOR
from torch import Tensor

from d3etr.config.data import DataConfig
from d3etr.config.training import EvaluationConfig
from d3etr.data.splits import open_split
from d3etr.detectors.build import build_detector
from d3etr.detectors.conditional_detr import ConditionalDETR
from d3etr.engine.distributed import SingleProcess
from d3etr.evaluation.evaluator import Evaluation, Evaluator

CPU = torch.device("cpu")


@dataclass
class Shard:
    """One of several workers that take turns: what the others gathered is handed to rank 0."""

    rank: int
    world_size: int
    others: list[Tensor] = field(default_factory=list)
    device: torch.device = CPU

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        if self.rank == 0:
            return [tensor, *self.others]
        self.others.append(tensor)
        return None


@pytest.fixture
def detector() -> ConditionalDETR:
    torch.default_generator.manual_seed(0)
    return build_detector(DETECTOR, 10)


def measure_sharded(detector: ConditionalDETR, data: DataConfig, workers: int) -> Evaluation:
    split = open_split(data, "validation")
    others: list[Tensor] = []
    for rank in reversed(range(workers)):
        shard = Shard(rank, workers, others)
        evaluation = Evaluator(split, data, EvaluationConfig(batch_size=2), shard).measure(detector)
    return evaluation


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_shards_together_measure_what_one_worker_measures(
    scenes: DataConfig, detector: ConditionalDETR, workers: int
) -> None:
    alone = measure_sharded(detector, scenes, 1)
    together = measure_sharded(detector, scenes, workers)
    assert alone.metrics is not None and together.metrics is not None
    assert together.metrics.images == 7
    assert together.as_dict() == pytest.approx(alone.as_dict(), abs=1e-6)
    assert torch.equal(
        torch.tensor(alone.metrics.precision), torch.tensor(together.metrics.precision)
    )


def test_every_image_is_seen_exactly_once(scenes: DataConfig, detector: ConditionalDETR) -> None:
    split = open_split(scenes, "validation")
    seen: list[int] = []
    for rank in range(3):
        evaluator = Evaluator(split, scenes, EvaluationConfig(batch_size=2), Shard(rank, 3))
        evaluator.measure(detector, lambda images, targets, outputs: seen.extend(targets.image_ids))
    assert sorted(seen) == sorted(record.id for record in split.records)


def test_mode_is_restored_and_nothing_is_learned(
    scenes: DataConfig, detector: ConditionalDETR
) -> None:
    detector.train()
    evaluator = Evaluator(
        open_split(scenes, "validation"), scenes, EvaluationConfig(), SingleProcess(CPU)
    )
    first = evaluator.measure(detector)
    assert detector.training
    assert first.as_dict() == evaluator.measure(detector).as_dict()
    assert first.images_per_second > 0
    assert all(p.grad is None for p in detector.parameters())


def test_the_threshold_is_that_of_the_highest_f1(
    scenes: DataConfig, detector: ConditionalDETR, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_split(scenes, "validation")
    objects = split.objects
    corners = torch.from_numpy(objects.boxes_xywh).clone()
    corners[:, 2:] += corners[:, :2]
    ids = torch.tensor([split.records[index].id for index in objects.images.tolist()])
    # Every object is found with scores from 0.9 down to 0.5, and as often elsewhere below that.
    count = len(ids)
    columns = [torch.linspace(0.9, 0.5, count, dtype=torch.float64)[:, None], corners]
    right = torch.cat(columns, 1)
    wrong = torch.cat([columns[0] - 0.45, torch.zeros(count, 2), torch.ones(count, 2)], 1)
    numbers = torch.cat([right, wrong]).contiguous().view(torch.int64)
    labels = torch.from_numpy(objects.labels)
    heads = torch.stack([ids.repeat(2), labels.repeat(2)], 1)
    rows = torch.cat([heads, numbers], 1)
    evaluator = Evaluator(split, scenes, EvaluationConfig(batch_size=2), SingleProcess(CPU))
    monkeypatch.setattr(evaluator, "_detect_all", lambda *arguments: (rows, 1.0))
    found = evaluator.measure(detector)
    assert found.threshold == pytest.approx(0.5)
    monkeypatch.setattr(evaluator, "_detect_all", lambda *arguments: (rows[count:], 1.0))
    assert evaluator.measure(detector).threshold is None
