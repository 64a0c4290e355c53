"""Images with what is on them and what detectors see: predictions and attention in a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
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
    empty_note,
    headline,
    new_figure,
    panel_title,
)

PANEL_INCHES = 2.6
MANY_OBJECTS = 12
"""More boxes than this are drawn without labels, which would cover the picture."""
SHARP_SIDE = 200
"""Smaller images are shown pixel by pixel."""
HEAT = LinearSegmentedColormap.from_list(
    "attention", [(1, 1, 1, 0.0), (0.98, 0.85, 0.3, 0.55), (0.85, 0.2, 0.05, 0.85)]
)
"""From transparent over yellow to red: the picture stays visible where nobody looks."""


@dataclass(frozen=True)
class Objects:
    """K objects in an image, annotated or detected.

    Attributes:
        boxes_xyxy: [K, 4] in pixels of the image.
        names: K class names.
        scores: K probabilities; None for annotated objects.
        right: K times whether an annotated object of that class is there; None if unknown.
    """

    boxes_xyxy: Array | Sequence[Sequence[float]]
    names: Sequence[str]
    scores: Sequence[float] | None = None
    right: Sequence[bool] | None = None

    @property
    def labels(self) -> list[str]:
        """Name and score of each."""
        if self.scores is None:
            return list(self.names)
        pairs = zip(self.names, self.scores, strict=True)
        return [f"{name} {score:.2f}" for name, score in pairs]


@dataclass(frozen=True)
class Scene:
    """One image, what is on it and what each detector finds.

    Attributes:
        image: [height, width, 3] of 0..255.
        truth: annotated objects.
        detections: name of the detector -> what it detects, in the order of the panels; None
            where it cannot be used.
        title: what to call the image.
    """

    image: Image
    truth: Objects
    detections: Mapping[str, Objects | None]
    title: str = ""


@dataclass(frozen=True)
class Look:
    """What one detector does about an object.

    Attributes:
        attention: [h, w] over the whole image, sums to about 1.
        box_xyxy: the detected box in pixels.
        score: probability of the object's class.
    """

    attention: Array
    box_xyxy: Array
    score: float


@dataclass(frozen=True)
class ObjectView:
    """One object and how each detector looks at it.

    Attributes:
        image: [height, width, 3] of 0..255.
        box_xyxy: the annotated box in pixels.
        name: class name.
        looks: "Teacher", "Student", "Plain student" -> look; None: not detected.
    """

    image: Image
    box_xyxy: Array
    name: str
    looks: Mapping[str, Look | None]


def draw_predictions(scenes: Sequence[Scene], threshold: float, subject: str) -> Figure:
    """A grid: one row per image; columns are the truth and each detector.

    Args:
        scenes: at least one; all with the same detectors.
        threshold: detections below it were left out; the caption gives it.
        subject: what the images are, as in "validation images".
    """
    figure, rows = _grid([scene.image for scene in scenes], "Ground truth", scenes[0].detections)
    for scene, row in zip(scenes, rows, strict=True):
        found = [("Ground truth", scene.truth), *scene.detections.items()]
        for axes, (name, objects) in zip(row, found, strict=True):
            draw_image(axes, scene.image)
            if objects is not None:
                draw_boxes(axes, objects, _colour(name), "--" if objects is scene.truth else "-")
            if objects is None or not len(objects.names):
                axes.set_xlabel("nothing", fontsize=TEXT_SIZE, color=QUIET)
        row[0].set_ylabel(scene.title, fontsize=TEXT_SIZE, color=QUIET)
    headline(
        figure, f"Predictions on {subject}", f"detections with a score of at least {threshold:g}"
    )
    return figure


def draw_attention(views: Sequence[ObjectView], layer: str = "last decoder layer") -> Figure:
    """A grid: one row per object; the truth, then the cross-attention of each detector.

    Args:
        views: at least one; all with the same detectors.
        layer: whose attention it is, for the caption.
    """
    figure, rows = _grid([view.image for view in views], "Object", views[0].looks)
    for view, row in zip(views, rows, strict=True):
        draw_image(row[0], view.image)
        draw_boxes(row[0], Objects(view.box_xyxy[None], [view.name]), TRUTH, "--")
        for axes, (name, look) in zip(row[1:], view.looks.items(), strict=True):
            _draw_look(axes, view, look, _colour(name))
    headline(
        figure,
        "Where the detecting query looks",
        f"cross-attention of the {layer}, mean over heads",
    )
    return figure


def draw_image(axes: Axes, image: Image) -> None:
    """An image without ticks; small ones keep their pixels sharp."""
    axes.imshow(image, interpolation="nearest" if max(image.shape) < SHARP_SIDE else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#BBBBBB")
        spine.set_linewidth(0.6)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def draw_boxes(axes: Axes, objects: Objects, colour: str, stroke: str = "-") -> None:
    """Boxes with class and score; a white rim keeps them visible on any picture."""
    rim = [withStroke(linewidth=3.2, foreground="white", alpha=0.75)]
    for box, text in zip(objects.boxes_xyxy, objects.labels, strict=True):
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
        if len(objects.names) <= MANY_OBJECTS:
            _label(axes, left, top, bottom, text, colour)


def _grid(
    images: Sequence[Image], first: str, detectors: Mapping[str, object]
) -> tuple[Figure, list[list[Axes]]]:
    """Panels in rows as high as their images, with the columns' titles above the first row."""
    heights = [float(np.clip(image.shape[0] / image.shape[1], 0.4, 2.0)) for image in images]
    columns = [first, *detectors]
    figure = new_figure(PANEL_INCHES * len(columns), PANEL_INCHES * sum(heights) + 0.9)
    grid = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=heights)
    for axes, name in zip(grid[0], columns, strict=True):
        panel_title(axes, name, TRUTH if name == first else _colour(name))
    return figure, grid.tolist()


def _colour(name: str) -> str:
    return TRUTH if name == "Ground truth" else DETECTORS.get(name, PLAIN)


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


def _draw_look(axes: Axes, view: ObjectView, look: Look | None, colour: str) -> None:
    grey = np.repeat(view.image.mean(2, keepdims=True), 3, 2)
    draw_image(axes, (0.55 * grey + 0.45 * 255).astype(np.uint8))
    if look is None:
        empty_note(axes, "not detected")
        return
    height, width = view.image.shape[:2]
    heat = look.attention - look.attention.min()
    axes.imshow(
        heat / max(float(heat.max()), 1e-12),
        cmap=HEAT,
        vmin=0,
        vmax=1,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bilinear",
    )
    draw_boxes(axes, Objects(look.box_xyxy[None], [view.name], [look.score]), colour)
    rows, columns = look.attention.shape
    axes.set_xlabel(f"grid {rows} x {columns}", fontsize=TEXT_SIZE - 1, color=QUIET)
