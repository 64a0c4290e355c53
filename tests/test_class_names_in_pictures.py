"""Class names of any script, in pictures that are drawn."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from d3etr import fonts
from d3etr.drawing import draw
from d3etr.inference import Detections
from d3etr.tracking.figures.images import Objects, Scene, draw_predictions
from d3etr.tracking.figures.style import save

TREE = "\N{CJK UNIFIED IDEOGRAPH-6728}"


def square_font(path: Path, characters: str) -> Path:
    """A font whose every character is a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = {ord(char): f"u{ord(char):x}" for char in characters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    glyph = pen.glyph()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph()} | dict.fromkeys(names.values(), glyph))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The list of this machine's font files, to be filled; nothing is remembered of others."""
    files: list[str] = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: files)
    remembered = (fonts._system_fonts, fonts.font_for, fonts._warn)
    for each in remembered:
        each.cache_clear()
    yield files
    for each in remembered:
        each.cache_clear()


def detections(*names: str) -> Detections:
    boxes = np.tile(np.array([[50, 200, 350, 350]], np.float32), (len(names), 1))
    labels = np.arange(7, 7 + len(names))
    return Detections(boxes, np.full(len(names), 0.5, np.float32), labels, names)


def drawn(name: str) -> bytes:
    return draw(Image.new("RGB", (400, 400), "white"), detections(name)).tobytes()


def test_names_are_drawn_in_a_font_of_this_machine_that_has_their_letters(
    machine: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine.append(str(square_font(tmp_path / "squares.ttf", f"{TREE} .0123456789")))
    picture = np.frombuffer(drawn(TREE), np.uint8).reshape(400, 400, 3)
    label = picture[180:200, 52:66]
    assert (label == 255).all(2).mean() > 0.4, "the square that this font has for the letter"
    assert not caplog.records


def test_without_such_a_font_ids_are_drawn_and_one_sentence_says_so(
    machine: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert drawn(TREE) == drawn("id 7")
        assert drawn(TREE) == drawn("id 7")
    [record] = caplog.records
    text = record.getMessage()
    assert "1 class names" in text and "'\\u6728' is 'id 7'" in text and "Noto Sans CJK" in text


@pytest.mark.parametrize("name", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "дом", "", "a\nb\x1b[31m"])
def test_names_of_other_alphabets_need_no_font_of_the_machine(
    machine: list[str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert drawn(name) != drawn("id 7")
    assert not caplog.records


def test_broken_fonts_and_letters_that_are_none_are_passed_over(
    machine: list[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    machine += [str(tmp_path / "broken.ttf"), str(tmp_path / "missing.ttf")]
    assert drawn("\ud800") == drawn("id 7"), "half a character"
    assert fonts.readable_names([(1, TREE), (2, "tree")]) == ["id 1", "tree"]


@pytest.mark.parametrize("has_font", [True, False])
def test_figures_show_any_name_without_a_warning(
    machine: list[str], has_font: bool, tmp_path: Path
) -> None:
    if has_font:
        machine.append(str(square_font(tmp_path / "squares.ttf", f"{TREE} .0123456789")))
    images = {}
    for name in (TREE, "\N{CJK UNIFIED IDEOGRAPH-7334}", r"$\frac$"):
        scene = Scene(
            np.full((60, 60, 3), 255, np.uint8),
            Objects(np.array([[10.0, 30, 50, 50]]), fonts.readable_names([(7, name)])),
            {"Student": Objects(np.zeros((0, 4)), [], [])},
            title=name,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file = save(draw_predictions([scene], 0.5, "images"), tmp_path / "figure.png")
        images[name] = np.asarray(Image.open(file)).tobytes()
    assert len(set(images.values())) == (3 if has_font else 2), "without a font both are 'id 7'"
