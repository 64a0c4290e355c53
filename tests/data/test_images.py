from pathlib import Path

import numpy as np
import pytest
from coco_files import picture
from PIL import Image, UnidentifiedImageError

from d3etr.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    load_image,
    open_image,
    to_pixels,
    upright_rgb,
    upright_size,
)
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


STORED = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> how an upright picture lies in its file."""


def _rotated(file: Path, upright: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(STORED[orientation]).save(file, exif=exif, quality=98)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(tmp_path, orientation, ending):
    upright, file = picture(40, 30), tmp_path / f"image.{ending}"
    _rotated(file, upright, orientation)
    with open_image(file) as image:
        assert upright_size(image) == (40, 30)
    for expected_size in (None, (40, 30)):
        loaded = load_image(file, expected_size)
        assert loaded.size == (40, 30)
        assert _difference(loaded, upright) < 3


@pytest.mark.parametrize("ending", ["jpg", "tif"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_made_on_the_stored_pixels_keep_them_unrotated(tmp_path, orientation, ending):
    upright, file = picture(40, 30), tmp_path / f"image.{ending}"
    _rotated(file, upright, orientation)
    loaded = load_image(file, (30, 40))
    assert loaded.size == (30, 40)
    assert _difference(loaded, upright.transpose(STORED[orientation])) < 3


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


@pytest.mark.parametrize("side", [9_747, 13_491])  # 95 and 182 megapixels
def test_a_scan_above_the_limit_is_refused_with_limit_and_remedy(tmp_path, recwarn, side):
    Image.new("1", (side, side)).save(tmp_path / "scan.png", compress_level=1)
    megapixels = -(-side * side // 10**6)
    with pytest.raises(UserError) as refusal:
        load_image(tmp_path / "scan.png")
    text = str(refusal.value)
    assert "scan.png: the image is too large" in text
    assert "the limit is 90" in text
    assert "tiles" in text
    assert f"D3ETR_MAXIMUM_MEGAPIXELS={megapixels} in the environment" in text
    assert not recwarn.list


def test_the_limit_of_pixels_is_what_the_environment_says(tmp_path, monkeypatch):
    file = tmp_path / "image.png"
    picture(40, 30).save(file)
    monkeypatch.setenv("D3ETR_MAXIMUM_MEGAPIXELS", "0.0012")
    assert load_image(file).size == (40, 30)
    monkeypatch.setenv("D3ETR_MAXIMUM_MEGAPIXELS", "0.0011")
    with pytest.raises(UserError, match=r"too large: 40 x 30"):
        load_image(file)
    for wrong in ("ninety", "0", "nan", "inf", "-1", ""):
        monkeypatch.setenv("D3ETR_MAXIMUM_MEGAPIXELS", wrong)
        with pytest.raises(UserError, match=r"D3ETR_MAXIMUM_MEGAPIXELS is '.*expected a number"):
            load_image(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x05\x16\x07" + bytes(80),
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!doctype html><html>404</html>",
        b"\x00\x00\x00\x18ftypheic" + bytes(80),
        b"\x00\x00\x00\x18ftypavif" + bytes(80),
        b"DDS \x7c\x00\x00\x00" + bytes([7]) * 200,
        b"%PDF-1.7",
        b"GIF89a" + bytes(8),
    ],
)
def test_what_cannot_be_decoded_is_one_sentence_that_names_it(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*image\.png: cannot be decoded: it is [^\n]*$"):
        load_image(tmp_path / "image.png")


def test_every_suffix_of_images_is_of_a_format_that_is_read(tmp_path):
    Image.init()
    formats = {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES}
    assert formats == {*FORMATS, "MPO"}
    picture(40, 30).save(tmp_path / "a.mpo", save_all=True, append_images=[picture(40, 30)])
    assert load_image(tmp_path / "a.mpo").size == (40, 30)


@pytest.mark.parametrize("kind", ["ICO", "EPS"])
def test_formats_whose_headers_cost_more_than_reading_are_not_opened(tmp_path, kind, monkeypatch):
    picture(40, 30).save(tmp_path / "image.png", kind)
    with Image.open(tmp_path / "image.png") as opened:
        assert opened.format == kind
    monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("opened"), None))
    with pytest.raises(UserError, match=r"no picture of a format that is read.*expected a whole"):
        load_image(tmp_path / "image.png")
    with pytest.raises(UnidentifiedImageError):
        open_image((tmp_path / "image.png").read_bytes())


def test_truncation_and_damage_are_told_apart(tmp_path):
    file = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="it is truncated"):
        load_image(file)
    place = whole.index(b"IDAT") + 40
    file.write_bytes(whole[:place] + bytes(60) + whole[place + 60 :])
    with pytest.raises(UserError, match=r"cannot be decoded: it is (damaged|truncated)"):
        load_image(file)


def test_files_that_cannot_be_opened_say_why(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_image(tmp_path)
    with pytest.raises(UserError, match="File name too long"):
        load_image(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="no such image file"):
        load_image(tmp_path / "a\0b.png")
    picture(4, 4).save(tmp_path / "image.png")
    with pytest.raises(UserError, match="no such image file"):
        load_image(tmp_path / "image.png" / "below.png")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.builtins.open", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load_image(tmp_path / "image.png")


def test_an_image_of_no_size_is_refused():
    with pytest.raises(UserError, match=r"the image has no pixels \(0 x 20\)"):
        upright_rgb(Image.new("RGB", (9, 20)).crop((3, 0, 3, 20)))


def test_one_pixel_is_an_image(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png").getpixel((0, 0)) == (1, 2, 3)
