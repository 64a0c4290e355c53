"""Figures draw something, also where there is little to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from d3etr.tracking.figures.curves import (
    Series,
    draw_precision_recall,
    draw_series,
)
from d3etr.tracking.figures.images import (
    MANY_OBJECTS,
    RIGHT,
    WRONG,
    Look,
    Objects,
    ObjectView,
    Scene,
    draw_attention,
    draw_predictions,
)
from d3etr.tracking.figures.style import save

NOTHING = Objects(np.zeros((0, 4)), [], [])


def boxes(count: int, scores: bool = True) -> Objects:
    corners = np.tile([[4.0, 4.0, 20.0, 24.0]], (count, 1))
    return Objects(corners, ["cat"] * count, [0.5] * count if scores else None)


def scene(**detections: Objects) -> Scene:
    image = np.full((32, 48, 3), 128, dtype=np.uint8)
    return Scene(image, boxes(1, scores=False), detections, "image 1")


def pixels(figure: Figure, folder: Path) -> np.ndarray:
    path = save(figure, folder / "drawn.png")
    assert [file.name for file in folder.iterdir()] == ["drawn.png"]
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def rows(*classes: float) -> np.ndarray:
    """[10, 101, C]: each class has one precision everywhere; -1 has no objects."""
    return np.broadcast_to(np.asarray(classes, dtype=float), (10, 101, len(classes))).copy()


@pytest.mark.parametrize("detections", [NOTHING, boxes(1), boxes(MANY_OBJECTS + 1)])
def test_predictions_draw_any_number_of_boxes(tmp_path: Path, detections: Objects) -> None:
    figure = draw_predictions(
        [scene(Teacher=detections, Student=NOTHING)], 0.5, "validation images"
    )
    assert len(figure.axes) == 3
    assert (figure.axes[1].get_xlabel() == "nothing") == (not detections.names)
    assert len(np.unique(pixels(figure, tmp_path).reshape(-1, 3), axis=0)) > 10


def test_predictions_without_teacher_have_two_columns() -> None:
    figure = draw_predictions([scene(Student=boxes(1)), scene(Student=boxes(2))], 0.5, "images")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Ground truth", "Student", "", ""]


def test_a_box_is_drawn_over_the_pixels_it_covers_and_is_red_where_it_is_wrong() -> None:
    grey = np.full((32, 48, 3), 128, dtype=np.uint8)
    wrong = Objects([[4.0, 4.0, 20.0, 24.0]], ["cat"], [0.5], [False])
    assert wrong.labels == ["(cat 0.50)"]
    for objects, colour in ((boxes(1, scores=False), RIGHT), (wrong, WRONG)):
        drawn = objects.drawn(grey)
        factor = drawn.width // 48
        middle = 14 * factor
        assert drawn.getpixel((4 * factor, middle)) == ImageColor.getrgb(colour)
        assert drawn.getpixel((20 * factor, middle)) == ImageColor.getrgb(colour)
        assert drawn.getpixel((12 * factor, middle)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("precision", "names"),
    [
        (rows(0.5), ["only"]),
        (rows(-1.0), ["absent"]),
        (rows(0.5, -1.0), ["there", "absent"]),
        (rows(*np.linspace(0, 1, 30)), [f"class {i}" for i in range(30)]),
    ],
)
def test_precision_recall_draws_any_classes(
    tmp_path: Path, precision: np.ndarray, names: Sequence[str]
) -> None:
    figure = draw_precision_recall({"Student": precision}, names, "10 images")
    present = int((precision[0] > -1).any(0).sum())
    drawn = [line for line in figure.axes[1].lines if len(line.get_xdata())]
    assert len(drawn) == present
    assert ("no objects to detect" in texts(figure)) == (present == 0)
    assert pixels(figure, tmp_path).min() < 100


def test_precision_recall_says_the_average_of_the_classes_with_objects() -> None:
    figure = draw_precision_recall({"Student": rows(0.5, -1.0)}, ["there", "absent"], "images")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0] == "Student, IoU 0.5: AP 50.0"


def test_attention_says_which_detector_misses_the_object(tmp_path: Path) -> None:
    look = Look(np.eye(4) / 4, np.array([4.0, 4.0, 20.0, 24.0]), 0.9)
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    flat = Look(np.full((1, 1), 1.0), look.box_xyxy, 0.3)
    views = [
        ObjectView(image, look.box_xyxy, "cat", {"Teacher": look, "Student": None}),
        ObjectView(image, look.box_xyxy, "cat", {"Teacher": flat, "Student": look}),
    ]
    figure = draw_attention(views)
    assert texts(figure).count("not detected") == 1
    assert len(np.unique(pixels(figure, tmp_path).reshape(-1, 3), axis=0)) > 100


def test_curves_draw_without_measurements(tmp_path: Path) -> None:
    empty = Series("student", [], [])
    assert "not measured yet" in texts(draw_series([empty], "mAP (%)"))
    few = draw_series([empty], "unchanged", nothing="fewer than two")
    assert "fewer than two" in texts(few)
    teacher = Series("teacher", [0], [0.6], level=True)
    full = draw_series([Series("student", [1, 2], [0.1, 0.2]), teacher], "mAP (%)")
    labels = [text.get_text() for text in full.axes[0].get_legend().get_texts()]
    assert labels == ["student", "teacher: 60.0"]
    assert list(full.axes[0].lines[0].get_ydata()) == [10.0, 20.0]
    assert pixels(full, tmp_path).min() < 100
