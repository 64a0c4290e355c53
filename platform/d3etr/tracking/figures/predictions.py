"""Predictions of teacher and student beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from d3etr.tracking.figures.style import (
    DETECTORS,
    PLAIN,
    QUIET,
    TEXT_SIZE,
    TRUTH,
    Array,
    Image,
    headline,
    new_figure,
    panel_title,
)

PANEL_INCHES = 2.6
MANY_BOXES = 12
"""More boxes than this are drawn without labels, which would cover the picture."""


@dataclass(frozen=True)
class Boxes:
    """Objects in one image.

    Attributes:
        boxes_xyxy: [K, 4] in pixels of the image.
        names: K class names.
        scores: K probabilities; None for ground truth.
    """

    boxes_xyxy: Array
    names: Sequence[str]
    scores: Sequence[float] | None = None


@dataclass(frozen=True)
class Scene:
    """One image and what is said about it.

    Attributes:
        image: [height, width, 3] of 0..255.
        truth: annotated objects.
        detections: "Teacher", "Student" -> what it detects, in the order of the panels.
        title: what to call the image.
    """

    image: Image
    truth: Boxes
    detections: Mapping[str, Boxes]
    title: str = ""

    @property
    def panels(self) -> list[tuple[str, Boxes, str, str]]:
        """(title, boxes, colour, line style) of each panel of the image's row."""
        found = [
            (name, boxes, DETECTORS.get(name, PLAIN), "-")
            for name, boxes in self.detections.items()
        ]
        return [("Ground truth", self.truth, TRUTH, "--"), *found]


def draw_predictions(scenes: Sequence[Scene], threshold: float, subject: str) -> Figure:
    """A grid: one row per image; columns are the truth and each detector.

    Args:
        scenes: at least one; all with the same detectors.
        threshold: detections below it were left out; the caption says so.
        subject: what the images are, as in "validation images".
    """
    columns = len(scenes[0].panels)
    heights = [
        float(np.clip(scene.image.shape[0] / scene.image.shape[1], 0.4, 2.0)) for scene in scenes
    ]
    figure = new_figure(PANEL_INCHES * columns, PANEL_INCHES * sum(heights) + 0.9)
    grid = figure.subplots(len(scenes), columns, squeeze=False, height_ratios=heights)
    for row, scene in enumerate(scenes):
        for column, (label, boxes, colour, stroke) in enumerate(scene.panels):
            axes = grid[row, column]
            draw_image(axes, scene.image)
            draw_boxes(axes, boxes, colour, stroke)
            if not len(boxes.names):
                axes.set_xlabel("nothing", fontsize=TEXT_SIZE, color=QUIET)
            panel_title(axes, label if row == 0 else "", colour)
        grid[row, 0].set_ylabel(scene.title, fontsize=TEXT_SIZE, color=QUIET)
    headline(
        figure, f"Predictions on {subject}", f"detections with a score of at least {threshold:g}"
    )
    return figure


def draw_image(axes: Axes, image: Image) -> None:
    """An image without ticks; small ones keep their pixels sharp."""
    axes.imshow(image, interpolation="nearest" if max(image.shape) < 200 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")
        spine.set_linewidth(0.6)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def draw_boxes(axes: Axes, boxes: Boxes, colour: str, stroke: str = "-") -> None:
    """Boxes with class and score; a white rim keeps them visible on any picture."""
    rim = [withStroke(linewidth=3.2, foreground="white", alpha=0.75)]
    scores = boxes.scores if boxes.scores is not None else [None] * len(boxes.names)
    for box, name, score in zip(np.asarray(boxes.boxes_xyxy), boxes.names, scores, strict=True):
        left, top, right, bottom = (float(edge) for edge in box)
        # Pixel i covers [i, i + 1) in box coordinates and [i - 0.5, i + 0.5) in an image plot.
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colour,
                linewidth=1.7,
                linestyle=stroke,
                path_effects=rim,
            )
        )
        if len(boxes.names) <= MANY_BOXES:
            _label(
                axes, left, top, bottom, name if score is None else f"{name} {score:.2f}", colour
            )


def _label(axes: Axes, left: float, top: float, bottom: float, text: str, colour: str) -> None:
    """Above the box, or below it where the picture ends."""
    fits_above = top > 0.08 * abs(axes.get_ylim()[0] - axes.get_ylim()[1])
    axes.text(
        max(left, 0.0) - 0.5,
        top - 0.5 if fits_above else bottom - 0.5,
        text,
        va="bottom" if fits_above else "top",
        fontsize=7,
        color="white",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )
