"""Images without annotations: all in a folder, or those that a COCO file lists."""

from __future__ import annotations

from pathlib import Path

from d3etr.data.annotations import Annotations, ImageEntry, Problems, Source
from d3etr.data.formats.coco import read_images
from d3etr.data.formats.files import digest_of, image_sizes, images_below
from d3etr.errors import UserError


class UnlabelledImages:
    """What ``data.unlabelled`` names; no format of a split with labels, so no recipe names it."""

    title = "images without labels"

    def read(self, source: Source) -> Annotations:
        """List the images; boxes that a COCO file has are not read.

        Raises:
            UserError: there is none, or one that is no image; the text names every such file.
        """
        if source.annotations.is_dir():
            return _folder(source.annotations)
        images, digest = read_images(source.annotations)
        return Annotations((), images, (), digest, own_ids=True)


def _folder(folder: Path) -> Annotations:
    """Every image below a folder, numbered from 1 in the order of their names."""
    names = sorted(file.relative_to(folder).as_posix() for file in images_below(folder))
    if not names:
        raise UserError(f"{folder} holds no image; expected pictures in it or in folders below")
    problems = Problems(folder, "folder of images")
    sizes = image_sizes([folder / name for name in names], problems)
    problems.raise_if_any()
    images = [
        ImageEntry(number, name, *size)
        for number, (name, size) in enumerate(zip(names, sizes, strict=True), start=1)
    ]
    digest = digest_of(
        (image.file_name, f"{image.width} {image.height}".encode()) for image in images
    )
    return Annotations((), images, (), digest)
