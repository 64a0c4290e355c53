"""Decoding image files to upright 8-bit RGB, whatever mode they are stored in."""

from __future__ import annotations

import math
import os
import threading
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from d3etr.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LIMIT_VARIABLE = "D3ETR_MAXIMUM_MEGAPIXELS"
"""Environment variable: the largest image that is decoded, millions of pixels."""
MAXIMUM_MEGAPIXELS = 90.0
"""Pillow's own limit, rounded: 3 bytes a pixel."""
# Pillow's limit is a global variable, and forking must not leave this lock taken.
_OPENING = threading.Lock()
os.register_at_fork(
    before=_OPENING.acquire,
    after_in_parent=_OPENING.release,
    after_in_child=_OPENING.release,
)
FORMATS = (
    *("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"),
    *("AVIF", "JPEG2000", "PPM", "DIB", "DDS", "TGA"),
)
"""That are read, by Pillow's names; JPEG is MPO too. Not even headers are read of others: an icon's
pixels would be decoded before their number is known, and PostScript be run as the program it is."""
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dds", ".dib", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo", ".pgm"}
    | {".png", ".ppm", ".tif", ".tiff", ".tga", ".webp"}
)
"""Of names of files that are taken for pictures where a folder is read."""
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_FIRST_SWAPPING_ORIENTATION = 5
"""Orientations 5 to 8 swap width and height."""
_BACK = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation -> what undoes its rotation."""


def load_image(source: Path | bytes, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    Greyscale, palette, CMYK, 16-bit and transparent images are converted. A rotation in the
    EXIF data is applied, as viewers and annotation tools do, unless ``expected_size`` shows that
    the annotations were made on the unrotated pixels, as COCO's own tools read them.

    Args:
        source: a file, or its bytes.
        expected_size: (width, height) that the annotations give, pixels.

    Raises:
        UserError: the file is missing, too large, truncated, damaged or not an image.
    """
    where = str(source) if isinstance(source, Path) else "image"
    try:
        with open_image(source) as image:
            return upright_rgb(image, expected_size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # damaged bytes lead decoders to errors of any type
        raise UserError(f"{where}: {decoding_problem(error)}") from error


def open_image(source: Path | bytes) -> Image.Image:
    """Read the header of an image file of ``FORMATS``, without Pillow's warning about its size.

    Args:
        source: a file, or its bytes.

    Raises:
        Exception: whatever Pillow raises; ``decoding_problem`` explains it.
    """
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            Image.init()  # earlier versions of Pillow know no AVIF
            known = [name for name in FORMATS if name in Image.OPEN]
            return Image.open(source if isinstance(source, Path) else BytesIO(source), "r", known)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def upright_rgb(image: Image.Image, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """8-bit RGB of an image that may not be decoded yet, rotated as its EXIF data says.

    Args:
        image: in any mode.
        expected_size: (width, height) that annotations give, see ``load_image``.

    Raises:
        UserError: the image has no pixels or too many, or its mode has no RGB values.
    """
    require_decodable_size(image.size)
    # Pillow applies the rotation of a TIFF as it decodes it, and no longer knows of it then.
    turn = orientation(image) if isinstance(image, TiffImageFile) else 1
    unturned = turn in _BACK and not applies_rotation(image, expected_size)
    image.load()
    if unturned:
        return to_rgb(image.transpose(_BACK[turn]))
    if applies_rotation(image, expected_size):
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def require_decodable_size(size: tuple[int, int]) -> None:
    """Check an image's size before its pixels are decoded.

    Args:
        size: (width, height) in pixels.

    Raises:
        UserError: it has no pixels, or more than ``D3ETR_MAXIMUM_MEGAPIXELS`` allows.
    """
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"the image has no pixels ({width} x {height}); expected at least 1 x 1")
    megapixels, limit = width * height / 1e6, _maximum_megapixels()
    if megapixels > limit:
        raise UserError(
            f"the image is too large: {width} x {height} are {megapixels:.1f} megapixels, the "
            f"limit is {limit:g}. Cut it into tiles (ImageMagick: magick IMAGE -crop 1024x1024 "
            "+repage tile-%04d.png), which also keeps small objects visible, or allow it: "
            f"{LIMIT_VARIABLE}={math.ceil(megapixels)} in the environment"
        )


def _maximum_megapixels() -> float:
    text = os.environ.get(LIMIT_VARIABLE)
    if text is None:
        return MAXIMUM_MEGAPIXELS
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < math.inf:
        raise UserError(
            f"{LIMIT_VARIABLE} is '{text}' in the environment; expected a number of megapixels "
            f"above 0, such as {MAXIMUM_MEGAPIXELS:g}"
        )
    return limit


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    if isinstance(image, ImageFile.ImageFile) and not image.info:
        # Looking for EXIF data takes half as long as decoding a small image.
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Damaged EXIF data says nothing about the pixels.
        return 1
    return value if value in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of an image file once the EXIF rotation is applied."""
    width, height = _stored_size(image)
    swapped = orientation(image) >= _FIRST_SWAPPING_ORIENTATION
    return (height, width) if swapped else (width, height)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as pixels lie in the file; Pillow gives those of a TIFF with its rotation."""
    if not isinstance(image, TiffImageFile):
        return image.size
    tags = image.tag_v2
    return tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]


def applies_rotation(image: Image.Image, expected_size: tuple[int, int] | None) -> bool:
    """Whether ``image`` has an EXIF rotation that ``expected_size`` does not contradict."""
    turn = orientation(image)
    if turn == 1:
        return False
    swaps = turn >= _FIRST_SWAPPING_ORIENTATION
    size = _stored_size(image)
    return not (swaps and size == expected_size and size[0] != size[1])


def to_pixels(image: Image.Image) -> Tensor:
    """[3, height, width] uint8 of an RGB image; in memory a pixel's channels are adjacent."""
    import torch  # exported detectors run without it

    # Left in that order: resizing takes half the time on it.
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in any mode.

    Raises:
        UserError: floating-point pixels, or a mode that has no RGB values.
    """
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        # 257 maps 65535 to 255; Pillow's own conversion cuts everything above 255.
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point pixels have no defined range: convert it to 8 bits")
    elif image.mode == "P":
        # Straight to RGB, Pillow warns about palettes with transparency.
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"pixels of mode {image.mode} cannot be converted to RGB") from error


def decoding_problem(error: Exception) -> str:
    """What is wrong with an image file, and what to do.

    Args:
        error: what reading or decoding it raised.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError) or "null byte" in str(error):
        return "no such image file; check the path"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "cannot be decoded: its pixels need more memory than there is; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return (
            "cannot be decoded: it is empty, damaged at its beginning, or no picture of a format "
            "that is read, as a Git LFS pointer, a web page, an icon, PostScript, a HEIC picture "
            "or a video is none; expected a whole JPEG, PNG, TIFF, BMP, WebP or GIF image"
        )
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "cannot be decoded: it is truncated; copy it again"
    return f"cannot be decoded: it is damaged ({error or type(error).__name__}); copy it again"
