"""Images decoded and augmented: ours beside a loop of PIL and torchvision; and who waits for them.

The loop is DETR's own way: PIL opens, crops, resizes, mirrors and jitters, torchvision makes a
tensor of it. It is told what to do, draws nothing and has no boxes; ours draws, and moves boxes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from benchmarks.machine import ROOT
from benchmarks.photos import write_photos
from benchmarks.side_by_side import Comparison, Scale, alternate, per_second, wait
from benchmarks.step_costs import Case
from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.config.load import load_config
from d3etr.data.augmentation import Augmentation
from d3etr.data.dataset import DetectionDataset
from d3etr.data.splits import DetectionSplit, read_split
from d3etr.data.transforms import collate
from d3etr.structures import ImageBatch
from d3etr.timing import PhaseTimer

RECIPE = ROOT / "trainers" / "recipes" / "digits" / "plain.yaml"
IMAGES, SMOKE_IMAGES = 24, 2
STEPS, SMOKE_STEPS = 30, 4
SIDES = tuple(range(480, 801, 32))
PREPROCESSING = PreprocessingConfig()
AUGMENTATIONS = {
    "sizes, crops and mirrors": AugmentationConfig(shortest_sides=SIDES, crop=0.5),
    "colours jittered too": AugmentationConfig(shortest_sides=SIDES, crop=0.5, colour_jitter=0.4),
}
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LOOP, OURS = "torchvision/PIL loop", "d3etr"


def compare(scale: Scale) -> list[Comparison]:
    """Images per second of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            photos = write_photos(Path(folder), SMOKE_IMAGES if scale.smoke else IMAGES)
            split = read_split("train", photos)
            decoded = [decoding(split, what, scale.rounds) for what in AUGMENTATIONS]
        return [*decoded, waiting(scale)]
    finally:
        torch.set_num_threads(threads)


def decoding(split: DetectionSplit, what: str, rounds: int) -> Comparison:
    """One kind of augmentation; every round sees each image once, in another epoch."""
    dataset = DetectionDataset(split, PREPROCESSING, AUGMENTATIONS[what], cache_bytes=0)
    images = range(len(dataset))
    taken = alternate(
        {
            LOOP: epochs(lambda epoch: [looped(dataset, index, epoch) for index in images]),
            OURS: epochs(lambda epoch: [batched(dataset, index, epoch) for index in images]),
        },
        rounds,
        torch.device("cpu"),
    )
    title = f"Input, one core: JPEG of 640 x 480 to tensors of 480 to 800 x up to 1333, {what}"
    return Comparison(title, "images per second", per_second(taken, len(images)), LOOP)


def epochs(action: Callable[[int], object]) -> Callable[[], None]:
    """The action, in the next epoch at every call."""
    numbers = iter(range(1_000_000))
    return lambda: action(next(numbers)) and None


def batched(dataset: DetectionDataset, index: int, epoch: int) -> ImageBatch:
    """One image as a batch of its own, its boxes beside it."""
    images, _ = collate([dataset.sample(index, epoch)], dataset.preprocessing)
    return images


def looped(dataset: DetectionDataset, index: int, epoch: int) -> Tensor:
    """What torchvision's tutorials and DETR's code do with one image."""
    path = dataset.split.path(dataset.split.records[index])
    image = augmented(Image.open(path).convert("RGB"), dataset.plan(index, epoch))
    pixels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
    normalised: Tensor = functional.normalize(pixels, MEAN, DEVIATION)
    return normalised


def augmented(image: Image.Image, plan: Augmentation) -> Image.Image:
    """The plan, by PIL."""
    if plan.crop is not None:
        image = functional.crop(image, *plan.crop)
    image = functional.resize(image, list(plan.size))
    if plan.horizontal_flip:
        image = functional.horizontal_flip(image)
    if plan.jitter is not None:
        brightness, contrast, saturation, hue = plan.jitter
        image = functional.adjust_brightness(image, brightness)
        image = functional.adjust_contrast(image, contrast)
        image = functional.adjust_saturation(image, saturation)
        image = functional.adjust_hue(image, hue)
    return image


def waiting(scale: Scale) -> Comparison:
    """Percent of training steps' time that goes by until the next batch is there."""
    steps = SMOKE_STEPS if scale.smoke else STEPS
    values: dict[str, list[float]] = {"in the training process": [], "in a process beside": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if scale.smoke else 3):
            for workers, found in enumerate(values.values()):
                found.append(waited(workers, steps, Path(folder), scale.device))
    title = f"Waiting for input: {steps} plain steps of digit scenes, decoded and augmented"
    note = "Decoded images of so small a set are kept, as in every run: later epochs only augment."
    return Comparison(title, "percent of a step", values, notes=(note,))


def waited(workers: int, steps: int, folder: Path, device: torch.device) -> float:
    """Percent, in an epoch that is not the first."""
    settings = [f"data.digit_scenes.root={folder}", f"data.workers={workers}"]
    settings += ["data.digit_scenes.train_images=240", "data.digit_scenes.validation_images=8"]
    config = load_config(RECIPE, [*settings, "data.digit_scenes.test_images=8"])
    case, timer = Case(RECIPE.stem, config, device), PhaseTimer(device)
    try:
        case.do(case.epoch(0))
        batches = case.epoch(1)
        wait(device)
        begun = time.perf_counter()
        for _ in range(steps):
            with timer.phase("data", host=True):
                batch = next(batches)
            case.do([batch])
        wait(device)
        return 100 * timer.take()["data"] / (time.perf_counter() - begun)
    finally:
        case.close()
