"""Pre-training of a backbone on crops of objects, where ImageNet weights are out of reach.

A backbone that starts from random numbers learns nothing useful from the few gradients that a
young detector sends it. Classifying crops of the objects that are to be detected (and of
background) is a task that it learns in minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import DataConfig
from d3etr.config.training import OptimisationConfig, PretrainingConfig, ScheduleConfig
from d3etr.data.augmentation import augment_pixels, draw_augmentation
from d3etr.data.images import load_image, to_pixels
from d3etr.data.judgement import judge_categories
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit, open_split
from d3etr.data.transforms import normalise
from d3etr.detectors.backbones import Backbone, build_backbone
from d3etr.detectors.weights import write_tensors
from d3etr.engine.optimiser import build_optimiser, learning_rate_factor, set_learning_rates
from d3etr.engine.seeding import derive_seed, seed_generators
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.progress import OnProgress, duration, no_progress

logger = get_logger(__name__)

MARGIN = 1.4
"""Crops are cut this much larger than they are used, so that they can be shifted and scaled."""
_SHIFT, _SCALE = 0.06, 0.15
"""Largest shift (in crop sides) and change of scale of a crop in training."""
_TRIES = 20
_MEASURED = 20
"""First steps that tell how long all take."""
_FREE = 0.1
"""A background crop covers at most this share of an object."""

Window = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


class PretrainedBackbone(NamedTuple):
    """Share of the validation crops that are classified right, training crops, wall time."""

    accuracy: float
    crops: int
    seconds: float


def pretrain_backbone(
    data: DataConfig,
    backbone: BackboneConfig,
    output: Path,
    config: PretrainingConfig,
    *,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - it cannot change
    on_progress: OnProgress = no_progress,
) -> PretrainedBackbone:
    """Train a backbone to classify crops of the training split, and save it.

    Args:
        data: splits, normalisation and augmentation, as for the detector.
        backbone: what to train; ``trainable`` and ``frozen_stages`` do not apply here.
        output: the safetensors file to write; it appears only when it is complete.
        config: crops and optimisation.
        seed: of weights, crops and batches; equal seeds repeat a run on the CPU.
        device: where it is trained.
        on_progress: called with crops and steps.

    Raises:
        UserError: data cannot be used, the split has no objects, or the backbone cannot be
            trained from random weights.
    """
    begin = time.perf_counter()
    network = _untrained(backbone, seed)
    train, validation = (open_split(data, name, on_progress) for name in ("train", "validation"))
    judge_categories({"train": train, "validation": validation}).raise_errors()
    crops, labels = cut_crops(train, config, seed, on_progress)
    if not bool((labels < len(train.categories)).any()):
        raise UserError(f"{train.annotations}: no objects to crop; {train.name} needs labels")
    classifier = _classifier(network, len(train.categories) + 1, config).to(device)
    _train(classifier, crops, labels, data, config, seed, on_progress)
    accuracy = _accuracy(classifier, *cut_crops(validation, config, seed, on_progress), data)
    result = PretrainedBackbone(accuracy, len(crops), time.perf_counter() - begin)
    metadata = {
        "backbone": backbone.model_dump_json(),
        "pretraining": config.model_dump_json(),
        "result": json.dumps(result._asdict()),
        "categories": json.dumps([category.name for category in train.categories]),
        "data_digest": train.digest,
    }
    write_tensors(output, network.state_dict(), metadata)
    return result


def _train(
    classifier: nn.Sequential,
    crops: Tensor,
    labels: Tensor,
    data: DataConfig,
    config: PretrainingConfig,
    seed: int,
    on_progress: OnProgress,
) -> None:
    """Train on crops [n, 3, side, side] and labels [n]; says from its first steps how long."""
    device, optimisation = next(classifier.parameters()).device, _optimisation(config)
    optimiser = build_optimiser(classifier, classifier[0], optimisation)
    random, started = Random(f"pretraining/{seed}"), time.perf_counter()
    for step in range(config.steps):
        if step == _MEASURED:
            whole = config.steps * (time.perf_counter() - started) / step
            logger.info("pre-training takes about %s: %d steps", duration(whole), config.steps)
        chosen = random.choices(range(len(crops)), k=config.batch_size)
        shown = [augmented(crops[index], config, data, random) for index in chosen]
        logits = classifier(_normalised(shown, data).to(device))
        loss = functional.cross_entropy(logits, labels[chosen].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = learning_rate_factor(step, config.steps, optimisation.schedule)
        set_learning_rates(optimiser, rate)
        optimiser.step()
        on_progress("pre-training steps", step + 1, config.steps)


def _classifier(network: Backbone, classes: int, config: PretrainingConfig) -> nn.Sequential:
    """On the whole feature map, not its mean.

    Neighbours reach into many crops, and only their place distinguishes them from the object in
    the middle.
    """
    features = network.channels * math.ceil(config.crop_size / network.stride) ** 2
    return nn.Sequential(network, nn.Flatten(), nn.Linear(features, classes))


def _optimisation(config: PretrainingConfig) -> OptimisationConfig:
    return OptimisationConfig(
        steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        backbone_rate_factor=1.0,
        schedule=ScheduleConfig(kind="cosine", warmup_steps=config.steps // 20),
    )


def _untrained(backbone: BackboneConfig, seed: int) -> Backbone:
    if backbone.keeps_statistics:
        raise UserError(
            f"backbone '{backbone.name}' with norm 'frozen' cannot be trained from random weights: "
            "its batch statistics would be frozen at nothing. Set backbone.norm to 'group' or "
            "'batch'"
        )
    seed_generators(derive_seed(seed, "pretraining"), torch.device("cpu"))
    return build_backbone(backbone.model_copy(update={"trainable": True, "frozen_stages": 0}))


@torch.no_grad()
def _accuracy(classifier: nn.Sequential, crops: Tensor, labels: Tensor, data: DataConfig) -> float:
    """Share of the crops [n, 3, side, side] that are classified as their labels [n]."""
    classifier.eval()
    device = next(classifier.parameters()).device
    size = round(crops.shape[-1] / MARGIN)
    margin = (crops.shape[-1] - size) // 2
    shown = crops[..., margin : margin + size, margin : margin + size]
    right = 0
    for start in range(0, len(labels), 256):
        part = slice(start, start + 256)
        logits = classifier(_normalised([*shown[part]], data).to(device))
        right += int((logits.argmax(1).cpu() == labels[part]).sum())
    return right / max(1, len(labels))


def _normalised(images: Sequence[Tensor], data: DataConfig) -> Tensor:
    return torch.stack([normalise(image, data.preprocessing) for image in images])


def augmented(
    pixels: Tensor, config: PretrainingConfig, data: DataConfig, random: Random
) -> Tensor:
    """[3, crop_size, crop_size] uint8 of a crop [3, side, side] with margin.

    It is shifted, scaled, and else changed as the detector's training images are.
    """
    side = pixels.shape[-1]
    plan = draw_augmentation(side, side, data.augmentation, data.preprocessing, random)
    window = round(side / MARGIN * random.uniform(1 - _SCALE, 1 + _SCALE))
    shifts = (random.uniform(-_SHIFT, _SHIFT) * side / MARGIN for _ in range(2))
    top, left = (round((side - window) / 2 + shift) for shift in shifts)
    size = (config.crop_size, config.crop_size)
    return augment_pixels(pixels, replace(plan, crop=(top, left, window, window), size=size))


def cut_crops(
    split: DetectionSplit,
    config: PretrainingConfig,
    seed: int,
    on_progress: OnProgress = no_progress,
) -> tuple[Tensor, Tensor]:
    """Cut objects and backgrounds out of a split; each image is decoded once.

    Args:
        split: images and boxes.
        config: sizes and numbers.
        seed: of the choice of objects (where there are too many) and of backgrounds.
        on_progress: called after every image.

    Returns:
        Crops [n, 3, side, side] uint8, ``MARGIN`` larger than they are used, and labels [n] in
        [0, C]; C is background.

    Raises:
        UserError: an image cannot be read.
    """
    side = round(config.crop_size * MARGIN)
    random, background = Random(f"crops/{seed}"), len(split.categories)
    objects = sum(len(record.objects()[0]) for record in split.records)
    share = min(1.0, config.maximum_crops / max(1.0, objects * (1 + config.backgrounds)))
    crops, labels = [torch.zeros(0, 3, side, side, dtype=torch.uint8)], list[int]()
    for number, record in enumerate(split.records, start=1):
        windows = [*_windows(record, config, share, background, random)]
        if windows:
            image = load_image(split.path(record), (record.width, record.height))
            for window, label in windows:
                crop = image.resize((side, side), Image.Resampling.BILINEAR, box=window)
                crops.append(to_pixels(crop)[None])
                labels.append(label)
        on_progress(f"crops of {split.name}", number, len(split.records))
    return torch.cat(crops), torch.tensor(labels, dtype=torch.int64)


def _windows(
    record: ImageRecord, config: PretrainingConfig, share: float, background: int, random: Random
) -> Iterator[tuple[Window, int]]:
    """Windows of an image with labels: objects, and places of their size that hardly touch any."""
    labels, boxes = record.objects()
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-6)
    for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
        side = max(box[2] - box[0], box[3] - box[1]) * (1 + config.context) * MARGIN
        if random.random() < share:
            yield _square((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, side, record), label
        if random.random() >= share * config.backgrounds:
            continue
        for _ in range(_TRIES):
            x, y = random.random() * record.width, random.random() * record.height
            window = left, top, right, bottom = _square(x, y, side, record)
            # The margin is cut off again before the backbone sees the crop.
            used = _square((left + right) / 2, (top + bottom) / 2, side / MARGIN, record)
            low, high = np.maximum(boxes[:, :2], used[:2]), np.minimum(boxes[:, 2:], used[2:])
            if ((high - low).clip(0).prod(1) / areas).max(initial=0.0) <= _FREE:
                yield window, background
                break


def _square(x: float, y: float, side: float, record: ImageRecord) -> Window:
    """A square around (x, y), moved (and where it must be, shrunk) into the image."""
    side = min(side, record.width, record.height)
    left = min(max(x - side / 2, 0.0), record.width - side)
    top = min(max(y - side / 2, 0.0), record.height - side)
    return left, top, left + side, top + side
