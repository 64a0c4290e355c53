"""Pre-training of a backbone on crops: what ImageNet is elsewhere.

A backbone that starts from random numbers learns nothing useful from the few gradients that a
young detector sends it. Classifying crops of the very objects that are to be detected (and of
what is none) is a task that it learns in minutes.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig
from d3etr.config.detector import BackboneConfig
from d3etr.config.training import PretrainingConfig, ScheduleConfig
from d3etr.data.splits import DetectionSplit, open_split, require_same_categories
from d3etr.data.transforms import normalise
from d3etr.detectors.backbones import Backbone, build_backbone
from d3etr.detectors.weights import write_tensors
from d3etr.engine.crops import MARGIN, Crops, cut_crops
from d3etr.engine.schedule import learning_rate_factor
from d3etr.engine.seeding import derive_seed, seed_generators
from d3etr.errors import UserError
from d3etr.files import clear_disk_errors
from d3etr.progress import OnProgress

_SHIFT, _SCALE = 0.06, 0.15
"""Largest shift (in crop sides) and change of scale of a crop in training."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PretrainedBackbone:
    """A backbone file and what its network reaches.

    Attributes:
        path: safetensors file that ``student.backbone_weights`` takes.
        accuracy: share of the validation split's crops that are classified right.
        objects: the same over crops of objects only, leaving background out.
        crops: training crops.
        seconds: wall time of everything.
    """

    path: Path
    accuracy: float
    objects: float
    crops: int
    seconds: float


def pretrain_backbone(
    data: DataConfig,
    backbone: BackboneConfig,
    output: Path,
    config: PretrainingConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> PretrainedBackbone:
    """Train a backbone to classify crops of the training split, and save it.

    Args:
        data: splits, normalisation and augmentation, as the detector will see them.
        backbone: what to train; ``trainable`` and ``frozen_stages`` do not apply here.
        output: the safetensors file to write; it appears only when it is complete.
        config: crops and optimisation.
        seed: of weights, crops and batches; equal seeds repeat a run on the CPU.
        device: defaults to the CPU.
        on_progress: told of crops and steps.

    Raises:
        UserError: data cannot be used, the split has no objects, or the backbone cannot be
            trained from random weights.
    """
    begin = time.perf_counter()
    config = config or PretrainingConfig()
    network = _fresh_backbone(backbone, seed)
    train, validation = (open_split(data, name, on_progress) for name in ("train", "validation"))
    require_same_categories(train, validation)
    crops = cut_crops(train, config, seed, on_progress)
    _require_objects(crops, train)
    classifier = _Classifier(network, len(train.categories) + 1, config.crop_size)
    classifier.to(device or _CPU)
    _fit(classifier, crops, data, config, seed, on_progress)
    accuracy, objects = _measure(
        classifier, cut_crops(validation, config, seed, on_progress), data.preprocessing, config
    )
    seconds = time.perf_counter() - begin
    result = PretrainedBackbone(output, accuracy, objects, len(crops), seconds)
    _save(output, network, backbone, train, config, result)
    return result


class _Classifier(nn.Module):
    """A linear classifier on a backbone's whole feature map.

    Not on its mean: parts of neighbouring objects reach into many crops, and where something
    is tells them apart from the object in the middle.
    """

    def __init__(self, backbone: Backbone, classes: int, crop_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        cells = math.ceil(crop_size / backbone.stride) ** 2
        self.head = nn.Linear(backbone.channels * cells, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, crop_size, crop_size] -> logits [B, classes]."""
        logits: Tensor = self.head(self.backbone(pixels).flatten(1))
        return logits


def _fresh_backbone(config: BackboneConfig, seed: int) -> Backbone:
    if config.keeps_statistics:
        raise UserError(
            f"backbone '{config.name}' with norm 'frozen' cannot be trained from random weights: "
            "its batch statistics would be frozen at nothing. Set backbone.norm to 'group'"
        )
    seed_generators(derive_seed(seed, "pretraining"), _CPU)
    return build_backbone(config.model_copy(update={"trainable": True, "frozen_stages": 0}))


def _require_objects(crops: Crops, split: DetectionSplit) -> None:
    if not bool((crops.labels < len(split.categories)).any()):
        raise UserError(
            f"{split.annotations}: no objects to crop in the {split.name} split; pre-training "
            "classifies objects"
        )


def _fit(
    classifier: _Classifier,
    crops: Crops,
    data: DataConfig,
    config: PretrainingConfig,
    seed: int,
    on_progress: OnProgress | None,
) -> None:
    """AdamW with a warm-up and a cosine, a batch of random crops a step."""
    optimiser = AdamW(
        classifier.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = ScheduleConfig(kind="cosine", warmup_steps=config.steps // 20)
    generator = torch.Generator().manual_seed(derive_seed(seed, "pretraining batches"))
    device = classifier.head.weight.device
    classifier.train()
    for step in range(config.steps):
        chosen = torch.randint(len(crops), (config.batch_size,), generator=generator)
        pixels = augment_crops(crops.pixels[chosen], config, data.augmentation, generator)
        logits = classifier(_normalise(pixels, data.preprocessing).to(device))
        loss = functional.cross_entropy(logits, crops.labels[chosen].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            factor = learning_rate_factor(step, config.steps, schedule)
            group["lr"] = config.learning_rate * factor
        optimiser.step()
        if on_progress is not None:
            on_progress("pre-training steps", step + 1, config.steps)


def augment_crops(
    pixels: Tensor,
    config: PretrainingConfig,
    augmentation: AugmentationConfig,
    generator: torch.Generator,
) -> Tensor:
    """Shift and scale crops, and change their colours as the detector's images are changed.

    Args:
        pixels: [B, 3, side, side] uint8, with margin.
        config: crop_size.
        augmentation: chances of flip, channel permutation and inversion.
        generator: of everything random.

    Returns:
        [B, 3, crop_size, crop_size] float32 in [0, 255].
    """
    count = len(pixels)

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    scale = (1 + (torch.rand(count, generator=generator) * 2 - 1) * _SCALE) / MARGIN
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * 2 * _SHIFT / MARGIN
    mirrored = torch.where(chance(augmentation.horizontal_flip), -scale, scale)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = mirrored, scale, shift
    size = [count, 3, config.crop_size, config.crop_size]
    grid = functional.affine_grid(matrix, size, align_corners=False)
    values = functional.grid_sample(
        pixels.float(), grid, padding_mode="border", align_corners=False
    )
    orders = torch.rand(count, 3, generator=generator).argsort(1)
    kept = torch.arange(3).expand(count, 3)
    orders = torch.where(chance(augmentation.channel_permutation)[:, None], orders, kept)
    values = values.gather(1, orders[..., None, None].expand_as(values))
    inverted = chance(augmentation.inversion)[:, None, None, None]
    return torch.where(inverted, 255 - values, values)


def _normalise(pixels: Tensor, config: PreprocessingConfig) -> Tensor:
    return torch.stack([normalise(image, config) for image in pixels])


@torch.no_grad()
def _measure(
    classifier: _Classifier,
    crops: Crops,
    preprocessing: PreprocessingConfig,
    config: PretrainingConfig,
) -> tuple[float, float]:
    """Accuracy over all crops, and over those of objects."""
    if not len(crops):
        return 0.0, 0.0
    classifier.eval()
    device = classifier.head.weight.device
    margin = (crops.pixels.shape[-1] - config.crop_size) // 2
    window = slice(margin, margin + config.crop_size)
    right = []
    for start in range(0, len(crops), 256):
        pixels = crops.pixels[start : start + 256, :, window, window]
        logits = classifier(_normalise(pixels, preprocessing).to(device))
        right.append(logits.argmax(1).cpu() == crops.labels[start : start + 256])
    correct = torch.cat(right)
    objects = correct[crops.labels < classifier.head.out_features - 1]
    return float(correct.float().mean()), float(objects.float().mean()) if len(objects) else 0.0


def _save(
    output: Path,
    network: nn.Module,
    backbone: BackboneConfig,
    train: DetectionSplit,
    config: PretrainingConfig,
    result: PretrainedBackbone,
) -> None:
    numbers = {k: v for k, v in asdict(result).items() if k != "path"}
    metadata = {
        "backbone": backbone.model_dump_json(),
        "pretraining": config.model_dump_json(),
        "result": json.dumps(numbers),
        "categories": json.dumps([category.name for category in train.categories]),
        "data_digest": train.digest,
    }
    with clear_disk_errors("the backbone's weights", output.parent):
        write_tensors(output, network.state_dict(), metadata)
