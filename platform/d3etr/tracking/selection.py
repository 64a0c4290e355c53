"""Which images stand for a split: the same ones for every run."""

from __future__ import annotations

from collections.abc import Sequence

from d3etr.data.coco import DetectionSplit, ImageRecord


def choose_images(split: DetectionSplit, count: int) -> list[ImageRecord]:
    """Evenly spaced images with objects; without any where the split has no others."""
    inhabited = [record for record in split.records if len(record.objects()[0])]
    return spaced(inhabited or list(split.records), count)


def spaced(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """At most ``count`` of them, evenly spaced."""
    stride = max(1, len(records) // max(1, count))
    return list(records[::stride][:count])
