from pathlib import Path

import numpy as np
import pytest
from coco_files import picture
from PIL import Image

from d3etr.data.images import load_image, to_pixels
from d3etr.errors import UserError


def _difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    original = picture(40, 30)
    if mode == "I;16":
        grey = np.asarray(original.convert("L")).astype(np.uint16) * 257
        stored, expected = Image.fromarray(grey), original.convert("L").convert("RGB")
    else:
        stored = original.convert(mode)
        expected = stored.convert("RGB")
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    stored.save(file, **({"quality": 98} if mode == "CMYK" else {}))
    loaded = load_image(file)
    assert (loaded.mode, loaded.size) == ("RGB", (40, 30))
    assert _difference(loaded, expected) < 3


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path, recwarn):
    palette = picture(8, 8).convert("P")
    palette.save(tmp_path / "image.png", transparency=bytes(range(256)))
    assert load_image(tmp_path / "image.png").mode == "RGB"
    assert not recwarn.list


def _rotated_jpeg(file: Path, upright: Image.Image, orientation: int) -> None:
    stored = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(stored).save(file, exif=exif, quality=98)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = picture(40, 30)
    _rotated_jpeg(tmp_path / "image.jpg", upright, orientation)
    for expected_size in (None, (40, 30)):
        loaded = load_image(tmp_path / "image.jpg", expected_size)
        assert loaded.size == (40, 30)
        assert _difference(loaded, upright) < 3


def test_annotations_made_on_the_stored_pixels_keep_them_unrotated(tmp_path):
    upright = picture(40, 30)
    _rotated_jpeg(tmp_path / "image.jpg", upright, 6)
    loaded = load_image(tmp_path / "image.jpg", (30, 40))
    assert loaded.size == (30, 40)
    assert _difference(loaded, upright.transpose(Image.Transpose.ROTATE_90)) < 3


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_truncated_images_are_errors_that_name_the_file(tmp_path, ending):
    file = tmp_path / f"image.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for length in (0, 30, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"image\.{ending}: cannot be decoded"):
            load_image(file)


def test_other_files_and_missing_files_are_errors(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: cannot be decoded"):
        load_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"none\.png: no such image file"):
        load_image(tmp_path / "none.png")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(UserError, match=r"image\.tiff: floating-point pixels"):
        load_image(tmp_path / "image.tiff")


def test_damaged_exif_data_does_not_matter(tmp_path):
    picture(40, 30).save(tmp_path / "image.jpg", exif=b"Exif\0\0not a header at all")
    assert load_image(tmp_path / "image.jpg").size == (40, 30)


def test_pixels_are_channels_first():
    pixels = to_pixels(Image.new("RGB", (5, 3), (1, 2, 3)))
    assert pixels.shape == (3, 3, 5)
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]
