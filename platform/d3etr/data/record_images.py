"""The annotated image of a record, decoded; PyTorch is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from d3etr.data.images import load_image
from d3etr.data.records import ImageRecord
from d3etr.data.splits import DetectionSplit
from d3etr.errors import UserError


def record_image(split: DetectionSplit, record: ImageRecord) -> Image.Image:
    """8-bit RGB of one image, as annotated.

    Raises:
        UserError: the image is missing, damaged, or not of its annotated size.
    """
    path, shown = split.path(record), split.images.shown(record.file_name)
    expected = (record.width, record.height)
    try:
        image = load_image(path, expected)
    except UserError as error:
        text = str(error).replace(str(path), shown)
        raise UserError(f"image id {record.id}: {text}") from error
    if image.size != expected:
        raise UserError(
            f"image id {record.id}: {shown} is {image.size[0]} x {image.size[1]} pixels, but "
            f"{split.annotations} says {record.width} x {record.height}, so its boxes "
            "cannot be trusted: correct width and height, or use the image that was annotated"
        )
    return image


@contextmanager
def naming(split: DetectionSplit, record: ImageRecord) -> Iterator[None]:
    """Errors of the user's in what is done with an image say which image it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{split.images.shown(record.file_name)}: {error}") from error
