"""Images of a split, decoded and transformed one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from d3etr.config.data import AugmentationConfig, PreprocessingConfig
from d3etr.data.augmentation import (
    ALWAYS,
    Augmentation,
    Shown,
    augment_boxes,
    augment_pixels,
    draw_augmentation,
    sample_generator,
)
from d3etr.data.images import to_pixels
from d3etr.data.mosaic import boxes_on, compose
from d3etr.data.preprocessing import output_size
from d3etr.data.record_images import naming, record_image
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.data.teacher_boxes import FoundBoxes
from d3etr.data.transforms import RelativeBoxes, Sample, relative_cxcywh
from d3etr.data.views import TeacherViews

CACHE_BYTES = 256 * 2**20
"""Splits whose decoded images take less are decoded once and kept in memory."""
FIRST_PASS = range(1)
"""Over images without labels."""


class DetectionDataset(Dataset[Sample]):
    """Samples of a split.

    Args:
        split: images and boxes.
        preprocessing: resizing and normalisation.
        augmentation: None for evaluation.
        seed: with epoch and image index the only thing that augmentation depends on.
        cache_bytes: keep decoded images where the whole split takes at most this much memory.
        image_scale: a factor on the sides of images, of evaluation.

    Attributes:
        teacher_scale: where it is not 1, augmented samples have the teacher's pixels too, whose
            sides are the student's times this; from the decoded original, by the same plan.
        views: where set, an epoch (of images without labels a pass over them) shows one of an
            image's few views, whose augmentation is theirs; samples have what the teacher said
            about it in place of its pixels.
        teacher_boxes: of each image, what the teacher found, where it is boxes in files; they move
            as objects do.
    """

    teacher_scale: float = 1.0
    views: TeacherViews | None = None
    teacher_boxes: Sequence[FoundBoxes] | None = None

    def __init__(
        self,
        split: DetectionSplit,
        preprocessing: PreprocessingConfig,
        augmentation: AugmentationConfig | None = None,
        *,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
        image_scale: float = 1.0,
    ) -> None:
        self.split = split
        self.image_scale = image_scale
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        decoded_bytes = sum(3 * record.width * record.height for record in split.records)
        self._cache: dict[int, Tensor] | None = {} if decoded_bytes <= cache_bytes else None

    def show_teacher(self, scale: float) -> None:
        """Set ``teacher_scale``."""
        self.teacher_scale = scale

    def use_views(self, views: TeacherViews, unlabelled: TeacherViews | None = None) -> None:
        """Set ``views``, and those of images without labels, where there are some."""
        self.views = views

    def __len__(self) -> int:
        return len(self.split.records)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, epoch=0)

    def decoded(self, index: int) -> Tensor:
        """[3, height, width] uint8 of one image, as annotated; not to be changed in place.

        Raises:
            UserError: the image is missing, damaged, or not of its annotated size.
        """
        if self._cache is None:
            return self._decode(self.split.records[index])
        if index not in self._cache:
            self._cache[index] = self._decode(self.split.records[index]).contiguous()
        return self._cache[index]

    def plan(self, index: int, epoch: int, shown: Shown = ALWAYS) -> Augmentation:
        """What happens to image ``index`` in ``epoch``; nothing is decoded for it."""
        record = self.split.records[index]
        if self.augmentation is None:
            return Augmentation(self._size(record, self.image_scale))
        seed = self.seed
        if self.views is not None:
            seed, epoch = self.views.seed, self.views.view(epoch, index)
        generator = sample_generator(seed, epoch, index)
        return draw_augmentation(
            record.width,
            record.height,
            self.augmentation,
            self.preprocessing,
            generator,
            self.teacher_scale,
            shown=shown,
            place=(self.split.records, index),
        )

    def sample(
        self, index: int, epoch: int, *, taught: bool = True, shown: Shown = ALWAYS
    ) -> Sample:
        """Image ``index`` as it looks in ``epoch``.

        Args:
            index: of the image.
            epoch: from 0.
            taught: whether what the teacher sees, has found or said comes with it.
            shown: what the step at hand says.

        Raises:
            UserError: the image is missing, damaged, or not of its annotated size, or stored views
                are.
        """
        record, plan = self.split.records[index], self.plan(index, epoch, shown)
        together = _together(index, plan)
        labels, corners = zip(*(r.objects() for r in self._records(together)), strict=True)
        boxes, kept = _placed(corners, self._records(together), plan)
        decoded, theirs = self._source(together, plan), None
        if taught and plan.teacher_size is not None and self.views is None:
            theirs = augment_pixels(decoded, replace(plan, size=plan.teacher_size))
        return Sample(
            pixels=augment_pixels(decoded, plan),
            teacher_pixels=theirs,
            labels=np.concatenate(labels)[kept],
            boxes_cxcywh=boxes,
            of_teacher=self._found(index, plan) if taught else None,
            stored=self.views.record(index, epoch) if taught and self.views else None,
            image_id=record.id,
            original_size=(record.height, record.width),
        )

    def _found(self, index: int, plan: Augmentation) -> RelativeBoxes | None:
        """What the teacher found in an image, where it is boxes in files."""
        if self.teacher_boxes is None:
            return None
        together = _together(index, plan)
        found = [self.teacher_boxes[i] for i in together]
        boxes, kept = _placed([one.boxes_xyxy for one in found], self._records(together), plan)
        labels = np.concatenate([one.labels for one in found])
        scores = np.concatenate([one.scores for one in found])
        return RelativeBoxes(labels[kept], boxes, scores[kept])

    def _records(self, together: Sequence[int]) -> list[ImageRecord]:
        return [self.split.records[index] for index in together]

    def _source(self, together: Sequence[int], plan: Augmentation) -> Tensor:
        """[3, height, width] uint8 that the plan's other steps begin with."""
        images, mosaic = [self.decoded(index) for index in together], plan.strong.mosaic
        return images[0] if mosaic is None else compose(images, mosaic)

    def sizes(
        self, epoch: int, *, strong: bool = True, passes: range = FIRST_PASS
    ) -> NDArray[np.int64]:
        """[images, 2]: (height, width) of every image in ``epoch``, without decoding any.

        [images, 4] where the teacher sees another size, which stands behind the student's.

        Args:
            epoch: from 0.
            strong: whether they are augmented so (``Shown``).
            passes: over images without labels; see ``MixedDataset``.
        """
        if self.has_random_sizes:
            shown = Shown(strong=strong)
            plans = [self.plan(index, epoch, shown) for index in range(len(self))]
            sizes = [plan.size + (plan.teacher_size or ()) for plan in plans]
        else:
            scales = [self.image_scale, self.teacher_scale][: 1 + (self.teacher_scale != 1)]
            sizes = [
                sum((self._size(record, scale) for scale in scales), ())
                for record in self.split.records
            ]
        return np.array(sizes, dtype=np.int64)

    def _size(self, record: ImageRecord, scale: float) -> tuple[int, int]:
        with naming(self.split, record):
            return output_size(record.width, record.height, self.preprocessing, scale=scale)

    @property
    def has_random_sizes(self) -> bool:
        """Whether an image's size differs from epoch to epoch, whatever its batch's is."""
        augmentation = self.augmentation
        if augmentation is None or self.preprocessing.exact_size is not None:
            return False
        cut = augmentation.crop, augmentation.zoom_out, augmentation.iou_crop, augmentation.mosaic
        return any(cut) or augmentation.shortest_sides is not None

    def _decode(self, record: ImageRecord) -> Tensor:
        return to_pixels(record_image(self.split, record))


class MixedDataset(DetectionDataset):
    """Images with labels, and behind them, by one row of indices, images without.

    Behind n with labels, n + p m + i is image i of m without in their pass p: stored views follow
    these passes, all else that is drawn the epoch.

    Arguments are those of ``DetectionDataset``; ``split.unlabelled`` is there.
    """

    def __init__(
        self,
        split: DetectionSplit,
        preprocessing: PreprocessingConfig,
        augmentation: AugmentationConfig | None = None,
        *,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        cache_bytes //= 2
        super().__init__(split, preprocessing, augmentation, seed=seed, cache_bytes=cache_bytes)
        assert split.unlabelled is not None
        # No run's seed is negative: both draw apart.
        self._others = DetectionDataset(
            split.unlabelled, preprocessing, augmentation, seed=-1 - seed, cache_bytes=cache_bytes
        )

    def show_teacher(self, scale: float) -> None:
        """Of both."""
        super().show_teacher(scale)
        self._others.show_teacher(scale)

    def use_views(self, views: TeacherViews, unlabelled: TeacherViews | None = None) -> None:
        """Of both."""
        super().use_views(views)
        self._others.views = unlabelled

    def sample(
        self, index: int, epoch: int, *, taught: bool = True, shown: Shown = ALWAYS
    ) -> Sample:
        """Image ``index`` as it looks in ``epoch``; see ``DetectionDataset.sample``."""
        if index < len(self):
            return super().sample(index, epoch, taught=taught, shown=shown)
        number, beyond = divmod(index - len(self), len(self._others))
        drawn = epoch if self._others.views is None else number
        sample = self._others.sample(beyond, drawn, taught=taught, shown=shown)
        return replace(sample, labelled=False)

    def sizes(
        self, epoch: int, *, strong: bool = True, passes: range = FIRST_PASS
    ) -> NDArray[np.int64]:
        """[images, 2]: of those with labels, then of the others in each of ``passes``."""
        parts = [super().sizes(epoch, strong=strong)]
        if self._others.views is None:
            parts += [self._others.sizes(epoch, strong=strong)] * len(passes)
        else:
            parts += [self._others.sizes(number, strong=strong) for number in passes]
        return np.concatenate(parts)


def _together(index: int, plan: Augmentation) -> tuple[int, ...]:
    """The images that are in one picture."""
    mosaic = plan.strong.mosaic
    return (index,) if mosaic is None else mosaic.images


def _placed(
    boxes_xyxy: Sequence[NDArray[np.float64]], records: Sequence[ImageRecord], plan: Augmentation
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes of the images of one picture after its augmentation.

    Args:
        boxes_xyxy: [n, 4] of each image, pixels of that.
        records: the images.
        plan: their augmentation.

    Returns:
        [k, 4] relative cxcywh of those that are left, and [N] bool which of all N these are.
    """
    if plan.strong.mosaic is None:
        [boxes], size = boxes_xyxy, (records[0].height, records[0].width)
        kept = np.ones(len(boxes), dtype=np.bool_)
    else:
        boxes, kept = boxes_on(boxes_xyxy, records, plan.strong.mosaic)
        size = plan.strong.mosaic.size
    if plan.moves:  # resizing alone leaves relative boxes as they are
        boxes, left = augment_boxes(boxes, size, plan)
        kept &= left
        boxes, size = boxes[kept], plan.size
    return relative_cxcywh(boxes, *size), kept
