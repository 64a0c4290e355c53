"""Costs as Adaptive Matching meets them, of untrained and of trained decoders.

How long a solver takes depends on the costs: those of nearly equal queries are far harder than
random numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problems import CLASSES
from benchmarks.side_by_side import Scale
from d3etr.config.data import DigitScenesConfig, PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MatchingCostConfig
from d3etr.data.digit_scenes.drawing import draw_scene, load_divided_digits
from d3etr.data.transforms import normalise
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import load_weights
from d3etr.matching.assignment import CostBlock
from d3etr.methods.adaptive import AdaptiveMatching
from d3etr.structures import DecoderOutputs, ImageBatch, ObjectQueries

TEACHER = Path(__file__).resolve().parents[2] / "trainers/weights/digits-teacher.safetensors"


def _untrained(backbone: str, queries: int) -> DetectionTransformer:
    settings = {"backbone": {"name": backbone}, "queries": queries, "dropout": 0.0}
    return build_detector(DetectorConfig.parse(settings), CLASSES)


def problems(scale: Scale) -> dict[str, CostBlock]:
    """What Adaptive Matching has to solve, by kind."""
    return {"untrained": _untrained_problem(scale), "trained": _trained_problem(scale)}


@torch.no_grad()
def _untrained_problem(scale: Scale) -> CostBlock:
    torch.manual_seed(0)
    side = min(scale.image, 256)  # it is the queries that make the problem
    images = ImageBatch(torch.randn(scale.batch, 3, side, side)).to(scale.device)
    said = [
        _decoded(_untrained("resnet18", scale.queries).to(scale.device).eval(), images)
        for _ in range(2)
    ]
    return AdaptiveMatching(MatchingCostConfig(), 1.0, scale.queries).problem(said[0], said[1])


@torch.no_grad()
def _trained_problem(scale: Scale) -> CostBlock:
    """The shipped teacher against itself with other queries, mixtures of its own."""
    detector = load_weights(TEACHER)[0].to(scale.device).eval()
    config, digits = DigitScenesConfig(), load_divided_digits()["validation"]
    scenes = [draw_scene(config, "validation", k, digits).pixels for k in range(scale.batch)]
    settings = PreprocessingConfig(normalisation="per_image", shortest_side=None, longest_side=None)
    pixels = [normalise(torch.from_numpy(scene).permute(2, 0, 1), settings) for scene in scenes]
    images = ImageBatch(torch.stack(pixels)).to(scale.device)
    said = [_decoded(detector, images, _mixed(detector, scale.queries, k)) for k in range(2)]
    return AdaptiveMatching(MatchingCostConfig(), 1.0, scale.queries).problem(said[0], said[1])


def _decoded(
    detector: DetectionTransformer, images: ImageBatch, queries: ObjectQueries | None = None
) -> DecoderOutputs:
    memory = detector.encode(images)
    return detector.decode(memory, [queries or detector.object_queries(memory)])[0]


def _mixed(detector: DetectionTransformer, count: int, seed: int) -> ObjectQueries:
    """Many queries out of a detector's few: random mixtures of them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    own = detector.object_queries().detach()
    device = own.embedding.device
    shares = (2 * torch.randn(count, own.count, generator=generator)).softmax(-1).to(device)
    noise = torch.randn(count, own.embedding.shape[-1], generator=generator).to(device)
    mixed: Tensor = shares @ own.embedding + 0.3 * own.embedding.std(0) * noise
    reference = own.reference_logits
    return ObjectQueries(mixed, None if reference is None else shares @ reference)
