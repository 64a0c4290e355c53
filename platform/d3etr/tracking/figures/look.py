"""Detectors looked at while they detect: boxes, scores and attention of single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

from d3etr.config.data import DataConfig
from d3etr.data.images import load_image
from d3etr.data.loading import EvaluationBatches
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.base import DetectionTransformer
from d3etr.fonts import readable_names
from d3etr.inference import Predictor
from d3etr.matching.boxes import cxcywh_to_xyxy
from d3etr.structures import DecoderOutputs, Levels
from d3etr.tracking.figures.images import Look, Objects, ObjectView, Scene
from d3etr.tracking.figures.style import Array, Image

SAME_OBJECT_IOU = 0.5
TEACHER = "Teacher"
"""What figures of a run call its teacher."""
THRESHOLD = 0.3
"""Lowest score of a detection that is shown."""
LOWEST_SCORE = 0.1
"""A query below it does not count as detecting an object."""


def scene_of(
    split: DetectionSplit, record: ImageRecord, predictors: Mapping[str, Predictor | None]
) -> Scene:
    """An image, its annotated objects without crowds, and what each detector finds on it.

    Args:
        split: where the image is.
        record: the image.
        predictors: name -> what detects; None where it cannot be used.

    Raises:
        UserError: the image cannot be read.
    """
    names = readable_names((each.id, each.name) for each in split.categories)
    labels, boxes = record.objects()
    truth = Objects(boxes, [names[label] for label in labels.tolist()])
    pixels = pixels_of(split, record)
    found: dict[str, Objects | None] = {}
    for name, predictor in predictors.items():
        found[name] = None
        if predictor is not None:
            [seen] = predictor.predict(pixels, THRESHOLD)
            called = readable_names(zip(seen.labels.tolist(), seen.names, strict=True))
            corners = np.asarray(seen.boxes_xyxy, dtype=float)
            right = which_are_right(corners, called, truth)
            found[name] = Objects(corners, called, seen.scores.tolist(), right)
    return Scene(pixels, truth, found, record.file_name)


def which_are_right(
    boxes: Array | Sequence[Sequence[float]], names: Sequence[str], truth: Objects
) -> tuple[bool, ...]:
    """Which detections, most certain first, find an object that none before has found."""
    if not names or not truth.names:
        return (False,) * len(names)
    overlaps = box_iou(
        *(torch.as_tensor(np.asarray(each)) for each in (boxes, truth.boxes_xyxy))
    ).numpy()
    free = np.ones(len(truth.names), dtype=bool)
    verdicts = []
    for row, name in zip(overlaps, names, strict=True):
        same = np.array([other == name for other in truth.names])
        overlap = np.where(same & free, row, 0.0)
        best = int(overlap.argmax())
        verdicts.append(bool(overlap[best] >= SAME_OBJECT_IOU))
        free[best] &= not verdicts[-1]
    return tuple(verdicts)


def pixels_of(split: DetectionSplit, record: ImageRecord) -> Image:
    """[height, width, 3] of 0..255, as annotated."""
    image = load_image(split.path(record), (record.width, record.height))
    return np.asarray(image, dtype=np.uint8)


@torch.no_grad()
def look_at(
    detector: DetectionTransformer,
    split: DetectionSplit,
    records: Sequence[ImageRecord],
    data: DataConfig,
    image_scale: float = 1.0,
) -> dict[int, DecoderOutputs]:
    """Run a detector on single images, unpadded, with its attention.

    Args:
        detector: in evaluation mode, on the CPU.
        split: where the images are.
        records: which of them.
        data: how they are prepared.
        image_scale: a factor on their sides.

    Returns:
        Image id -> outputs of a batch of this image alone.
    """
    chosen = replace(split, records=tuple(records))
    alone = data.model_copy(update={"workers": 0, "bucket_by_aspect": False})
    seen = {}
    for images, targets in EvaluationBatches(
        chosen, alone, batch_size=1, rank=0, world_size=1, image_scale=image_scale
    ):
        memory = detector.encode(images)
        [outputs] = detector.decode(memory, [detector.object_queries(memory)], attention=True)
        seen[targets.image_ids[0]] = outputs
    return seen


def object_view(
    split: DetectionSplit,
    record: ImageRecord,
    seen: Mapping[str, Mapping[int, DecoderOutputs]],
    names: Sequence[str],
) -> ObjectView | None:
    """The image's largest object through the eyes of each detector; None if it has none.

    Args:
        split: where the image is.
        record: the image.
        seen: detector -> image id -> its outputs.
        names: of the classes.
    """
    labels, boxes = record.objects()
    if not len(labels):
        return None
    largest = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
    label, box = int(labels[largest]), boxes[largest]
    looks = {name: look_for(by_id[record.id], record, label, box) for name, by_id in seen.items()}
    return ObjectView(pixels_of(split, record), box, names[label], looks)


def look_for(
    outputs: DecoderOutputs, record: ImageRecord, label: int, box_xyxy: Array
) -> Look | None:
    """How a detector looks at an object; None if no query detects it.

    The query is the one with the highest probability of the object's class among those
    whose box overlaps the object's enough.

    Args:
        outputs: of a batch of the image alone, with attention.
        record: the image.
        label: contiguous label of the object.
        box_xyxy: [4] in pixels.
    """
    size = torch.tensor([record.width, record.height] * 2)
    boxes = cxcywh_to_xyxy(outputs.boxes_cxcywh[-1, 0]) * size
    overlap = box_iou(torch.as_tensor(box_xyxy, dtype=boxes.dtype)[None], boxes)[0]
    scores = outputs.logits[-1, 0, :, label].sigmoid() * (overlap >= SAME_OBJECT_IOU)
    query = int(scores.argmax())
    if scores[query] < LOWEST_SCORE:
        return None
    attention = outputs.cross_attention[-1, 0, :, query].mean(0)
    heat = on_finest_level(attention, outputs.levels)
    return Look(heat, boxes[query].double().numpy(), float(scores[query]))


def on_finest_level(attention: Tensor, levels: Levels) -> Array:
    """One map of a map over all feature levels, [S] to [h, w]: each token's mass on its place."""
    height, width = levels[0]
    heat = torch.zeros(height, width)
    for part, (h, w) in zip(
        torch.split(attention, [h * w for h, w in levels]), levels, strict=True
    ):
        # Nearest neighbours repeat a cell: its mass is shared among the copies.
        plane = functional.interpolate(part.reshape(1, 1, h, w), size=(height, width))
        heat += plane[0, 0] * (h * w / (height * width))
    return heat.double().numpy()


def choose_images(split: DetectionSplit, count: int) -> list[ImageRecord]:
    """Evenly spaced images with objects; without any where the split has no others."""
    inhabited = [record for record in split.records if len(record.objects()[0])]
    return spaced(inhabited or list(split.records), count)


def spaced(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """At most ``count`` of them, evenly spaced."""
    stride = max(1, len(records) // max(1, count))
    return list(records[::stride][:count])
