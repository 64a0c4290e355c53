"""Images with what is on them and what detectors see: predictions and attention in a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from d3etr.drawing import draw_boxes
from d3etr.tracking.figures.style import (
    DETECTORS,
    PLAIN,
    TEXT_SIZE,
    TRUTH,
    Array,
    Image,
    empty_note,
    new_figure,
)

PANEL_INCHES = 2.6
MANY_OBJECTS = 12
"""More boxes than this are drawn without labels, which would cover the picture."""
RIGHT, WRONG = TRUTH, "#C0392B"
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
        """Name and score of each; what is wrong in brackets."""
        scores = self.scores if self.scores is not None else [None] * len(self.names)
        right = self.right if self.right is not None else [True] * len(self.names)
        texts = [
            name if score is None else f"{name} {score:.2f}"
            for name, score in zip(self.names, scores, strict=True)
        ]
        return [text if fine else f"({text})" for text, fine in zip(texts, right, strict=True)]

    def drawn(self, image: Image, colour: str = RIGHT) -> PIL.Image.Image:
        """The image with the boxes; ``colour`` is that of all that are not known to be wrong."""
        right = self.right if self.right is not None else [True] * len(self.names)
        few = len(self.names) <= MANY_OBJECTS
        return draw_boxes(
            PIL.Image.fromarray(image),
            np.asarray(self.boxes_xyxy, dtype=float).reshape(-1, 4),
            self.labels if few else [""] * len(self.names),
            [colour if fine else WRONG for fine in right],
        )


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
        threshold: detections below it were left out; the title gives it.
        subject: what the images are, as in "validation images".
    """
    title = f"Predictions on {subject}, with a score of at least {threshold:g}"
    figure, rows = _grid(
        [scene.image for scene in scenes], ["Ground truth", *scenes[0].detections], title
    )
    for scene, row in zip(scenes, rows, strict=True):
        shown = [("Ground truth", scene.truth), *scene.detections.items()]
        for axes, (name, objects) in zip(row, shown, strict=True):
            found = objects or Objects([], [])
            axes.imshow(found.drawn(scene.image, _colour(name)))
            if not found.names:
                axes.set_xlabel("nothing", fontsize=TEXT_SIZE)
        row[0].set_ylabel(scene.title, fontsize=TEXT_SIZE)
    return figure


def draw_attention(views: Sequence[ObjectView]) -> Figure:
    """A grid: one row per object; the truth, then the cross-attention of each detector.

    Args:
        views: at least one; all with the same detectors.
    """
    title = "Cross-attention of the detecting query: last decoder layer, mean over heads"
    figure, rows = _grid([view.image for view in views], ["Object", *views[0].looks], title)
    for view, row in zip(views, rows, strict=True):
        row[0].imshow(Objects(view.box_xyxy[None], [view.name]).drawn(view.image))
        for axes, (name, look) in zip(row[1:], view.looks.items(), strict=True):
            if look is None:
                axes.imshow(_heated(view.image, np.zeros((1, 1))))
                empty_note(axes, "not detected")
                continue
            found = Objects(look.box_xyxy[None], [view.name], [look.score])
            axes.imshow(found.drawn(_heated(view.image, look.attention), _colour(name)))
            height, width = look.attention.shape
            axes.set_xlabel(f"grid {height} x {width}", fontsize=TEXT_SIZE)
    return figure


def _grid(
    images: Sequence[Image], columns: Sequence[str], title: str
) -> tuple[Figure, list[list[Axes]]]:
    """Panels in rows as high as their images, with the columns' titles above the first row."""
    heights = [float(np.clip(image.shape[0] / image.shape[1], 0.4, 2.0)) for image in images]
    size = (PANEL_INCHES * len(columns), PANEL_INCHES * sum(heights) + 0.9)
    figure = new_figure(*size, title)
    grid = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, loc="left", fontsize=10, color=_colour(name))
    return figure, grid.tolist()


def _colour(name: str) -> str:
    return TRUTH if name in ("Ground truth", "Object") else DETECTORS.get(name, PLAIN)


def _heated(image: Image, attention: Array) -> Image:
    """The image in pale grey below its attention, [height, width, 3] of 0..255."""
    heat = attention - attention.min()
    map_ = PIL.Image.fromarray((heat / max(float(heat.max()), 1e-12)).astype(np.float32))
    height, width = image.shape[:2]
    coloured = HEAT(np.asarray(map_.resize((width, height), PIL.Image.Resampling.BILINEAR)))
    pale = 0.55 * image.mean(2, keepdims=True) + 0.45 * 255
    alpha = coloured[..., 3:]
    blended: Image = ((1 - alpha) * pale + alpha * 255 * coloured[..., :3]).astype(np.uint8)
    return blended
