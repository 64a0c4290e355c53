"""Configuration of data: where images and annotations are and what happens to them."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.location import Location, Url, refuse_url
from d3etr.config.urls import home_expanded

Side = Annotated[int, Field(ge=16, le=65_536)]
Probability = Annotated[float, Field(ge=0, le=1)]
FilePath = Annotated[
    Path,
    Field(strict=False),
    # A default is a Path already; reading JSON accepts text only.
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    BeforeValidator(refuse_url),
    AfterValidator(lambda path: home_expanded(str(path))),
]
"""A path written as text, ``~`` is the home; relative ones start at the working directory."""


class SplitConfig(Section):
    """Images and annotations of one split."""

    images: Location | None = None
    """Folder, or its URL, that the annotations' file names are relative to; null where the
    format itself says where images are (YOLO, Pascal VOC, image folder)."""
    annotations: Location
    """COCO detection JSON or its URL; YOLO's data.yaml; folder of a Pascal VOC data set or of its
    XML files; image folder with metadata.jsonl."""
    format: Annotated[str, Field(min_length=1)] = "auto"
    """coco, yolo, voc, imagefolder, or one that a package adds; auto: what the path looks like."""
    subset: Annotated[str, Field(min_length=1)] | None = None
    """The part of a data set in one folder: a key of data.yaml, a list in ImageSets/Main, a
    folder; null: train, val or test, as the split is called."""
    follow_links: bool = False
    """Whether links in the folder may lead to images outside of it; the folder itself may be a
    link in any case."""

    @model_validator(mode="after")
    def _coco_needs_images(self) -> Self:
        place = self.annotations
        remote, name = isinstance(place, Url), (place.path if isinstance(place, Url) else place)
        is_coco = self.format == "coco" or (
            self.format == "auto" and (remote or name.suffix.lower() == ".json")
        )
        if is_coco and self.images is None:
            raise ValueError(
                "images is missing: expected the folder that the COCO file's names are relative to"
            )
        return self


class DigitScenesConfig(Section):
    """The embedded benchmark: handwritten digits composed into cluttered scenes."""

    root: FilePath = Path("data/digit-scenes")
    """Parent folder; every distinct setting gets a folder of its own below it."""
    train_images: Annotated[int, Field(ge=1, le=MAXIMUM)] = 6000
    """In the training split."""
    validation_images: Annotated[int, Field(ge=1, le=MAXIMUM)] = 500
    """In the validation split."""
    test_images: Annotated[int, Field(ge=1, le=MAXIMUM)] = 1000
    """In the test split."""
    image_size: Annotated[int, Field(ge=32, le=1024)] = 64
    """Side of the square images."""
    minimum_objects: Annotated[int, Field(ge=0, le=MAXIMUM)] = 1
    """Fewest digits in an image."""
    maximum_objects: Annotated[int, Field(ge=1, le=MAXIMUM)] = 5
    """Most digits in an image."""
    minimum_scale: Annotated[int, Field(ge=6, le=MAXIMUM)] = 10
    """Shortest long side of a digit, pixels; sizes are log-uniform."""
    maximum_scale: Annotated[int, Field(ge=6, le=MAXIMUM)] = 28
    """Longest long side of a digit, pixels."""
    seed: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Of the scenes; another one gives other images."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        if self.minimum_objects > self.maximum_objects:
            raise ValueError("minimum_objects is above maximum_objects")
        if not self.minimum_scale <= self.maximum_scale <= self.image_size:
            raise ValueError("expected minimum_scale <= maximum_scale <= image_size")
        return self


class UnlabelledConfig(Section):
    """Images beside the training images: without labels, or with those that a file has for them."""

    images: Location | None = None
    """Folder, or its URL: every image in it and in the folders below."""
    annotations: Location | None = None
    """COCO file, or its URL, that lists which of the images are meant; needed where these are at a
    URL. Its boxes are not read."""
    follow_links: bool = False
    """Whether links in the folder may lead to images outside of it."""
    rest_of_train: bool = False
    """Take the training images that ``data.labelled_share`` leaves without labels."""
    digit_scenes: DigitScenesConfig | None = None
    """Take the training split of digit scenes with other settings, such as another seed."""
    labels: Location | None = None
    """COCO file, or its URL, of boxes on these images, such as ``d3etr pseudo-label`` writes, found
    by file name: they are training images like the others then, for any method."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of each batch, rounded to whole images; the others have labels. Without effect beside
    ``labels``."""

    @property
    def without_effect(self) -> frozenset[str]:
        """Where all images have labels, no part of a batch is without."""
        return frozenset() if self.labels is None else frozenset({"share"})

    @property
    def place(self) -> SplitConfig | None:
        """The folder and what lists its images; None where they are no files of the user's."""
        if self.images is None:
            return None
        listed = self.annotations or self.images
        return SplitConfig(images=self.images, annotations=listed, follow_links=self.follow_links)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {
            "images": self.images is not None,
            "rest_of_train": self.rest_of_train,
            "digit_scenes": self.digit_scenes is not None,
        }
        named = [key for key, there in given.items() if there]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"needs one of images, rest_of_train and digit_scenes (found {found})")
        if self.images is None and (self.annotations is not None or self.follow_links):
            raise ValueError("annotations and follow_links have no effect without images")
        if isinstance(self.images, Url) and self.annotations is None:
            raise ValueError(
                "annotations is missing: a URL's images are found by a COCO file that lists them"
            )
        if self.labels is not None and "share" in self.model_fields_set:
            raise ValueError(
                "share has no effect beside labels: all images have labels then, and an epoch is "
                "one pass over them. Remove one of the two"
            )
        return self


STRONG = ("photometric", "zoom_out", "iou_crop", "mosaic")
"""Augmentations that published recipes end before training does."""


class AugmentationConfig(Section):
    """Training-time transforms; validation only resizes."""

    shortest_sides: Annotated[tuple[Side, ...], Field(min_length=1)] | None = None
    """Multi-scale training: one of these is drawn per image; None keeps the preprocessing's. With
    ``preprocessing.exact_size`` one is drawn per batch, and that size is scaled to it."""
    horizontal_flip: Probability = 0.5
    """Share of images that are mirrored left to right."""
    vertical_flip: Probability = 0.0
    """Share of images that are mirrored top to bottom."""
    crop: Probability = 0.0
    """Share of images that are cropped (to 50-100 % of each side) before resizing."""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength of random brightness, contrast, saturation and (a tenth of it) hue."""
    channel_permutation: Probability = 0.0
    """Share of images whose colour channels are permuted."""
    inversion: Probability = 0.0
    """Share of images whose colours are inverted."""
    photometric: Probability = 0.0
    """SSD's distortion of colours, torchvision's RandomPhotometricDistort: the probability of each
    of brightness (factor 0.875 to 1.125), contrast and saturation (0.5 to 1.5), hue (a twentieth
    of a turn) and another order of the channels. RT-DETR has 0.5."""
    zoom_out: Probability = 0.0
    """Share of images that are put at random on a black canvas of 1 to 4 times their sides (SSD).
    RT-DETR has 0.5. Not done to an image of ``mosaic``."""
    iou_crop: Probability = 0.0
    """Share of images that a window is cut out of, chosen by its overlap with an object (SSD's
    crop: 0.3 to 1 of each side, aspect 0.5 to 2); objects whose centre is in it are kept. RT-DETR
    has 0.8. Not done to an image of ``mosaic`` or without objects."""
    mosaic: Probability = 0.0
    """Share of images that are shown with three random others of the training images around one
    point, at 0.5 to 1.5 times half of the picture's size (YOLOX; DEIM has 0.5, and turns them)."""
    off_for_last_epochs: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """``photometric``, ``zoom_out``, ``iou_crop`` and ``mosaic`` are off in the last so many passes
    over the training images, also where ``optimisation.steps`` says how long a run is."""

    @property
    def strong(self) -> bool:
        """Whether there is anything that ``off_for_last_epochs`` switches off."""
        return any(getattr(self, key) for key in STRONG)

    @model_validator(mode="after")
    def _something_ends(self) -> Self:
        if self.off_for_last_epochs and not self.strong:
            raise ValueError(
                f"off_for_last_epochs has no effect: {', '.join(STRONG)} are 0, and no others are "
                "switched off"
            )
        return self


class PreprocessingConfig(Section):
    """What an image goes through before a detector sees it; weights files carry it along."""

    normalisation: Literal["imagenet", "per_image", "unit"] = "imagenet"
    """imagenet: fixed mean and deviation, what torchvision's weights expect. per_image: each
    channel of each image by its own mean and deviation. unit: values in [0, 1] as they are, which
    RT-DETR and D-FINE expect."""
    shortest_side: Side | None = 800
    """Images are resized so that their shorter side has this many pixels; None keeps them."""
    longest_side: Side | None = 1333
    """Upper bound of the longer side after resizing."""
    exact_size: tuple[Side, Side] | None = None
    """[height, width] that images are stretched to whatever their shape, as for RT-DETR and D-FINE
    ([640, 640]), in place of ``shortest_side`` and ``longest_side``."""

    @property
    def without_effect(self) -> frozenset[str]:
        """Sides do nothing beside an exact size."""
        if self.exact_size is None:
            return frozenset({"exact_size"})
        return frozenset({"shortest_side", "longest_side"})

    @model_validator(mode="after")
    def _sides_are_ordered(self) -> Self:
        if self.exact_size is not None:
            sides = {"shortest_side", "longest_side"}
            given = sorted(k for k in sides & self.model_fields_set if getattr(self, k) is not None)
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would have no effect beside exact_size, which "
                    "stretches images whatever their shape: set to null what is not meant"
                )
            self.__dict__.update(shortest_side=None, longest_side=None)  # frozen from here on
        if self.longest_side and self.shortest_side and self.longest_side < self.shortest_side:
            raise ValueError("longest_side is below shortest_side")
        return self

    def scaled(self, factor: float) -> Self | None:
        """What images ``factor`` times as large go through; None where no sides say how large."""
        if factor == 1:
            return self
        if self.exact_size is not None:
            height, width = self.exact_size
            exact = round(factor * height), round(factor * width)
            return self.model_copy(update={"exact_size": exact})
        if self.shortest_side is None:
            return None
        longest = self.longest_side and round(factor * self.longest_side)
        sides = {"shortest_side": round(factor * self.shortest_side), "longest_side": longest}
        return self.model_copy(update=sides)


class DataConfig(Section):
    """Images, annotations, and what is done to them before a detector sees them."""

    dataset: Location | None = None
    """Short for the annotations of train and validation where one path holds both: a YOLO
    data.yaml, a Pascal VOC folder, an image folder. Resolved into these two."""
    train: SplitConfig | None = None
    """Images to learn from."""
    validation: SplitConfig | None = None
    """Images that the student is measured on during training, and its weights chosen by."""
    test: SplitConfig | None = None
    """Images that are measured once, after training, where ``evaluation.test`` asks for it."""
    digit_scenes: DigitScenesConfig | None = None
    """Use the embedded benchmark instead of files of your own."""
    labelled_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the training images: those that keep their labels. The others are left out, or taken as
    unlabelled ones (``unlabelled.rest_of_train``)."""
    labelled_seed: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    """Which training images these are; with one seed, a larger share holds the smaller one's."""
    unlabelled: UnlabelledConfig | None = None
    """Images without labels, which part of every batch consists of; or labelled by a file."""
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    bucket_by_aspect: bool = True
    """Batch images of like shape together, so that padding is small."""
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Processes per training worker that decode and transform images."""

    @model_validator(mode="after")
    def _splits_of_dataset(self) -> Self:
        """``dataset`` is written out, so that a resolved configuration says what is read."""
        if self.dataset is None:
            return self
        clashing = [n for n in ("train", "validation", "digit_scenes") if getattr(self, n)]
        if clashing:
            raise ValueError(
                f"dataset stands for train and validation: remove {' and '.join(clashing)}, or "
                "dataset"
            )
        split = SplitConfig(annotations=self.dataset)
        # Frozen from here on.
        self.__dict__.update(dataset=None, train=split, validation=split)
        self.__pydantic_fields_set__.update({"train", "validation"})
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.digit_scenes is None and (self.train is None or self.validation is None):
            raise ValueError("needs dataset, or digit_scenes, or both train and validation")
        if self.digit_scenes and (self.train or self.validation or self.test):
            raise ValueError("digit_scenes brings its own splits: remove train, validation, test")
        return self

    @model_validator(mode="after")
    def _labels_are_left_out(self) -> Self:
        if self.labelled_share == 1 and self.labelled_seed:
            raise ValueError("labelled_seed has no effect: labelled_share is 1")
        rest = self.unlabelled is not None and self.unlabelled.rest_of_train
        if self.labelled_share == 1 and rest:
            raise ValueError(
                "unlabelled.rest_of_train finds no image: labelled_share is 1, so all training "
                "images have labels; set it to what part keeps them"
            )
        scenes = None if self.unlabelled is None else self.unlabelled.digit_scenes
        if scenes is not None and self.digit_scenes is None:
            raise ValueError("unlabelled.digit_scenes goes with digit_scenes, not with files")
        return self

    def labelled_images(self, images: int) -> int:
        """How many of so many training images keep their labels, at least 1."""
        return max(1, round(self.labelled_share * images))

    def unlabelled_in(self, batch_size: int) -> int:
        """How many images of a batch have no labels."""
        if self.unlabelled is None or self.unlabelled.labels is not None:
            return 0
        return round(self.unlabelled.share * batch_size)
