"""Detectors looked at while they detect: boxes, scores and attention of single images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou

from d3etr.config.data import DataConfig
from d3etr.data.images import load_image
from d3etr.data.loading import evaluation_batches
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.detectors.base import DetectionTransformer
from d3etr.evaluation.postprocess import top_detections
from d3etr.matching.boxes import cxcywh_to_xyxy
from d3etr.structures import DecoderOutputs, Levels
from d3etr.tracking.figures.images import Look, Objects, ObjectView
from d3etr.tracking.figures.style import Array, Image

SAME_OBJECT_IOU = 0.5
LOWEST_SCORE = 0.1
"""A query below it does not count as detecting an object."""


@dataclass(frozen=True)
class Seen:
    """One image, its record and what a detector finds on it.

    Attributes:
        record: the annotated image.
        outputs: of a batch of this image alone, with attention.
    """

    record: ImageRecord
    outputs: DecoderOutputs

    def objects(self, names: Sequence[str], threshold: float) -> Objects:
        """Detections with at least this score, in pixels of the original image."""
        size = (self.record.height, self.record.width)
        scores, labels, corners = (part[0] for part in top_detections(self.outputs, [size], 100))
        kept = scores >= threshold
        return Objects(
            corners[kept].double().numpy(),
            [names[label] for label in labels[kept].tolist()],
            scores[kept].tolist(),
        )

    def look(self, label: int, box_xyxy: Array) -> Look | None:
        """How the detector looks at an object; None if no query detects it.

        The query is the one with the highest probability of the object's class among those
        whose box overlaps the object's enough.

        Args:
            label: contiguous label of the object.
            box_xyxy: [4] in pixels.
        """
        size = torch.tensor([self.record.width, self.record.height] * 2)
        boxes = cxcywh_to_xyxy(self.outputs.boxes_cxcywh[-1, 0]) * size
        overlap = box_iou(torch.as_tensor(box_xyxy, dtype=boxes.dtype)[None], boxes)[0]
        scores = self.outputs.logits[-1, 0, :, label].sigmoid() * (overlap >= SAME_OBJECT_IOU)
        query = int(scores.argmax())
        if scores[query] < LOWEST_SCORE:
            return None
        attention = self.outputs.cross_attention[-1, 0, :, query].mean(0)
        heat = on_finest_level(attention, self.outputs.levels)
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


@torch.no_grad()
def look_at(
    detector: DetectionTransformer,
    split: DetectionSplit,
    records: Sequence[ImageRecord],
    data: DataConfig,
) -> Iterator[Seen]:
    """Run a detector on single images, unpadded, with its attention.

    Args:
        detector: in evaluation mode, on the CPU.
        split: where the images are.
        records: which of them.
        data: how they are prepared.
    """
    chosen = replace(split, records=tuple(records))
    alone = data.model_copy(update={"workers": 0, "bucket_by_aspect": False})
    by_id = {record.id: record for record in records}
    for images, targets in evaluation_batches(chosen, alone, batch_size=1, rank=0, world_size=1):
        memory = detector.encode(images)
        [outputs] = detector.decode(memory, [detector.object_queries(memory)], attention=True)
        yield Seen(by_id[targets.image_ids[0]], outputs)


def pixels_of(split: DetectionSplit, record: ImageRecord) -> Image:
    """[height, width, 3] of 0..255, as annotated."""
    image = load_image(split.path(record), (record.width, record.height))
    return np.asarray(image, dtype=np.uint8)


def truth_of(record: ImageRecord, names: Sequence[str]) -> Objects:
    """The annotated objects, without crowds."""
    labels, boxes = record.objects()
    return Objects(boxes, [names[label] for label in labels.tolist()])


def largest_object(record: ImageRecord) -> tuple[int, Array] | None:
    """(label, box_xyxy) of the object that is easiest to see; None if there is none."""
    labels, boxes = record.objects()
    if not len(labels):
        return None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return int(labels[areas.argmax()]), boxes[areas.argmax()]


def object_view(
    split: DetectionSplit,
    record: ImageRecord,
    seen: Mapping[str, Mapping[int, Seen]],
    names: Sequence[str],
) -> ObjectView | None:
    """The image's most visible object through the eyes of each detector; None if it has none.

    Args:
        split: where the image is.
        record: the image.
        seen: detector -> image id -> what it sees.
        names: of the classes.
    """
    chosen = largest_object(record)
    if chosen is None:
        return None
    label, box = chosen
    looks = {name: images[record.id].look(label, box) for name, images in seen.items()}
    return ObjectView(pixels_of(split, record), box, names[label], looks)


def choose_images(split: DetectionSplit, count: int) -> list[ImageRecord]:
    """Evenly spaced images with objects; without any where the split has no others."""
    inhabited = [record for record in split.records if len(record.objects()[0])]
    return spaced(inhabited or list(split.records), count)


def spaced(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """At most ``count`` of them, evenly spaced."""
    stride = max(1, len(records) // max(1, count))
    return list(records[::stride][:count])
