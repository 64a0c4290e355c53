"""Where teacher and student look when they detect the same object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from d3etr.tracking.figures.predictions import Boxes, draw_boxes, draw_image
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
HEAT = LinearSegmentedColormap.from_list(
    "attention", [(1, 1, 1, 0.0), (0.98, 0.85, 0.3, 0.55), (0.85, 0.2, 0.05, 0.85)]
)
"""From transparent over yellow to red: the picture stays visible where nobody looks."""


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


def draw_attention(views: Sequence[ObjectView], layer: str = "last decoder layer") -> Figure:
    """A grid: one row per object; the truth, then the cross-attention of each detector.

    Args:
        views: at least one; all with the same detectors.
        layer: whose attention it is, for the caption.
    """
    detectors = list(views[0].looks)
    heights = [
        float(np.clip(view.image.shape[0] / view.image.shape[1], 0.4, 2.0)) for view in views
    ]
    width = PANEL_INCHES * (1 + len(detectors))
    figure = new_figure(width, PANEL_INCHES * sum(heights) + 0.9)
    grid = figure.subplots(len(views), 1 + len(detectors), squeeze=False, height_ratios=heights)
    for row, view in enumerate(views):
        draw_image(grid[row, 0], view.image)
        draw_boxes(grid[row, 0], Boxes(np.asarray([view.box_xyxy]), [view.name]), TRUTH, "--")
        for column, name in enumerate(detectors, start=1):
            _draw_look(grid[row, column], view, view.looks[name], DETECTORS.get(name, PLAIN))
    for column, name in enumerate(["Object", *detectors]):
        panel_title(grid[0, column], name, TRUTH if not column else DETECTORS.get(name, PLAIN))
    headline(
        figure,
        "Where the detecting query looks",
        f"cross-attention of the {layer}, mean over heads",
    )
    return figure


def _draw_look(axes: Axes, view: ObjectView, look: Look | None, colour: str) -> None:
    grey = np.repeat(view.image.mean(2, keepdims=True), 3, 2)
    faded = (0.55 * grey + 0.45 * 255).astype(np.uint8)
    draw_image(axes, faded)
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
    draw_boxes(axes, Boxes(np.asarray([look.box_xyxy]), [view.name], [look.score]), colour)
    rows, columns = look.attention.shape
    axes.set_xlabel(f"grid {rows} x {columns}", fontsize=TEXT_SIZE - 1, color=QUIET)
