"""Decoding image files to upright 8-bit RGB, whatever mode they are stored in."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from d3etr.errors import UserError

# All that Pillow's decoders raise on damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What brings each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_SWAPPING_ORIENTATION = 5
"""Orientations 5 to 8 swap width and height."""


def load_image(source: Path | bytes, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    Greyscale, palette, CMYK, 16-bit and transparent images are converted. A rotation in the
    EXIF data is applied, as viewers and annotation tools do, unless ``expected_size`` shows that
    the annotations were made on the unrotated pixels, as COCO's own tools read them.

    Args:
        source: a file, or its bytes.
        expected_size: (width, height) that the annotations give, pixels.

    Raises:
        UserError: the file is missing, truncated, damaged or not an image.
    """
    where = str(source) if isinstance(source, Path) else "image"
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source)) as image:
            image.load()
            if applies_rotation(image, expected_size):
                return to_rgb(image.transpose(_UPRIGHT[orientation(image)]))
            return to_rgb(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such image file; check the path") from error
    except _DAMAGE as error:
        raise UserError(
            f"{where}: cannot be decoded ({error}); expected a whole JPEG, PNG or other common "
            "image: copy it again, or take it out of the annotation file"
        ) from error


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    if not image.info:
        # Looking for EXIF data takes half as long as decoding a small image.
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        # Damaged EXIF data says nothing about the pixels.
        return 1
    return value if value in _UPRIGHT else 1


def applies_rotation(image: Image.Image, expected_size: tuple[int, int] | None) -> bool:
    """Whether ``image`` has an EXIF rotation that ``expected_size`` does not speak against."""
    turn = orientation(image)
    if turn == 1:
        return False
    swaps = turn >= _FIRST_SWAPPING_ORIENTATION
    stored_upright = image.size == expected_size and image.size[0] != image.size[1]
    return not (swaps and stored_upright)


def to_pixels(image: Image.Image) -> Tensor:
    """[3, height, width] uint8 of an RGB image; in memory a pixel's channels are together."""
    # Left in that order: resizing takes half the time on it.
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image in any mode.

    Raises:
        UserError: floating-point pixels.
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
    return image.convert("RGB")
