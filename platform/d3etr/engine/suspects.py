"""What in a recipe may keep a run from learning, and the settings that would change it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from d3etr.config.tree import Config
from d3etr.data.preprocessing import output_size
from d3etr.data.splits import DetectionSplit

MOST = 4
"""Suspects that are named."""
_LEAST_PIXELS = 8.0
"""Of the side of a small object: our choice, see docs/init.md."""
_FAR = 1.0
"""Between two logits of a box's size."""
_LOW_RATE, _RATE, _HIGH_RATE = 3e-4, 1e-3, 2e-3
"""Learning rates: from nothing, below the first hardly anything is learnt within minutes; above the
last many runs do not learn."""
_HIGH_TUNED_RATE = 5e-4
"""Likewise of what starts from weights that know other objects."""
_FEWEST_STEPS = 1500
_BACKBONE = "optimisation.backbone_rate_factor"


@dataclass(frozen=True)
class Facts:
    """What a run's data is like, and how long the run is.

    Attributes:
        steps: optimiser steps of the whole run.
        relative_size: median over objects of the square root of their share of the image.
        pixels: a quarter of the objects are smaller after resizing: square root of the area.
        enlarging: how many times as large images could be before they are enlarged.
        most_objects: in one image.
        classes: name -> objects.
    """

    steps: int
    relative_size: float
    pixels: float
    enlarging: float
    most_objects: int
    classes: dict[str, int]


@dataclass(frozen=True)
class Suspect:
    """A setting that may be the matter.

    Attributes:
        text: what is odd about it.
        overrides: what to set, as ``key=value``.
    """

    text: str
    overrides: tuple[str, ...]


def facts_of(config: Config, train: DetectionSplit, steps: int) -> Facts | None:
    """Facts of a run; None of a training split without objects.

    Args:
        config: the run.
        train: its training split.
        steps: of the whole run.
    """
    objects = train.objects
    if not len(objects.labels):
        return None
    preprocessing = config.data.preprocessing
    after = [output_size(r.width, r.height, preprocessing)[::-1] for r in train.records]
    scales = np.array(after) / np.array([(r.width, r.height) for r in train.records])
    areas = objects.boxes_xywh[:, 2:].prod(1)
    sides = np.sqrt(areas * scales[objects.images].prod(1))
    counts = np.bincount(objects.labels, minlength=len(train.categories))
    return Facts(
        steps=steps,
        relative_size=float(np.median(np.sqrt(areas / objects.sizes.prod(1)))),
        pixels=float(np.quantile(sides, 0.25)),
        enlarging=float(1 / np.median(scales)),
        most_objects=int(np.bincount(objects.images).max()),
        classes={c.name: int(n) for c, n in zip(train.categories, counts, strict=True)},
    )


def suspects(flat: bool, config: Config, facts: Facts) -> list[Suspect]:
    """What may be the matter, the likeliest first.

    Args:
        flat: the loss does not fall: sizes are less to blame than rates.
        config: of the run.
        facts: of its data.
    """
    frozen, sized = [_frozen(config)], [_size_bias(config, facts), _side(config, facts)]
    rest = [_queries(config, facts), _steps(config, facts)]
    order = [*frozen, _rate(config), *sized, *rest] if flat else [*frozen, *sized, _rate(config)]
    found = [one for one in (*order, *([] if flat else rest)) if one is not None]
    return found[:MOST]


def from_nothing(config: Config) -> bool:
    """Whether the backbone starts at random."""
    start = config.student.initialise_from
    return config.student.backbone_weights is None and (
        start is None or "backbone" not in start.parts
    )


def _frozen(config: Config) -> Suspect | None:
    backbone, factor = config.student.detector.backbone, config.optimisation.backbone_rate_factor
    if not from_nothing(config):
        return None
    if backbone.keeps_statistics:
        return Suspect(
            f"backbone '{backbone.name}' starts at random with frozen batch norm",
            ("student.detector.backbone.norm=group", f"{_BACKBONE}=1"),
        )
    if not backbone.trainable or backbone.frozen_stages:
        return Suspect(
            "the backbone starts at random and is frozen",
            (
                "student.detector.backbone.trainable=true",
                "student.detector.backbone.frozen_stages=0",
                f"{_BACKBONE}=1",
            ),
        )
    if factor < 0.5:
        return Suspect(
            f"the backbone starts at random and learns at {factor:g} of the rate",
            (f"{_BACKBONE}=1",),
        )
    return None


def _size_bias(config: Config, facts: Facts) -> Suspect | None:
    detector = config.student.detector
    if detector.queries_need_images:  # the encoder proposes boxes
        return None
    share = min(max(facts.relative_size, 0.005), 0.9)
    wanted = math.log(share / (1 - share))
    if abs(detector.box_size_bias - wanted) <= _FAR:
        return None
    begins = 1 / (1 + math.exp(-detector.box_size_bias))
    return Suspect(
        f"boxes begin at {100 * begins:.0f} % of the image's side, a typical object has "
        f"{100 * share:.0f} %",
        (f"student.detector.box_size_bias={wanted:.1f}",),
    )


def _side(config: Config, facts: Facts) -> Suspect | None:
    factor = min(_LEAST_PIXELS / max(facts.pixels, 1e-6), facts.enlarging)
    larger = config.data.preprocessing.scaled(factor)
    if facts.pixels >= _LEAST_PIXELS or factor < 1.1 or larger is None:
        return None
    sides = ("shortest_side", "longest_side")
    settings = {name: getattr(larger, name) for name in sides if getattr(larger, name)}
    if larger.exact_size is not None:
        settings = {"exact_size": [32 * math.ceil(side / 32) for side in larger.exact_size]}
    return Suspect(
        f"a quarter of the objects has less than {facts.pixels:.0f} pixels after resizing",
        tuple(f"data.preprocessing.{name}={value}" for name, value in settings.items()),
    )


def _rate(config: Config) -> Suspect | None:
    rate, anew = config.optimisation.learning_rate, from_nothing(config)
    if anew and rate < _LOW_RATE:
        return Suspect(
            f"learning rate {rate:g} is low for a start from nothing",
            (f"optimisation.learning_rate={_RATE:g}",),
        )
    if rate > (_HIGH_RATE if anew else _HIGH_TUNED_RATE):
        return Suspect(
            f"learning rate {rate:g} is high", (f"optimisation.learning_rate={rate / 5:.1g}",)
        )
    return None


def _queries(config: Config, facts: Facts) -> Suspect | None:
    queries, most = config.student.detector.queries, facts.most_objects
    wanted = max(40, 10 * math.ceil(0.3 * most))
    if queries < most:
        return Suspect(
            f"{queries} queries cannot find the {most} objects of the fullest image",
            (f"student.detector.queries={wanted}",),
        )
    if from_nothing(config) and queries > max(100, 10 * most):
        return Suspect(
            f"{queries} queries for at most {most} objects learn slowly from nothing",
            (f"student.detector.queries={wanted}",),
        )
    return None


def _steps(config: Config, facts: Facts) -> Suspect | None:
    warmup = config.optimisation.schedule.warmup_steps
    if 2 * warmup > facts.steps:
        return Suspect(
            f"the warm-up takes {warmup:,} of {facts.steps:,} steps",
            (f"optimisation.schedule.warmup_steps={max(1, facts.steps // 10)}",),
        )
    if from_nothing(config) and facts.steps < _FEWEST_STEPS:
        return Suspect(
            f"{facts.steps:,} steps are few for a start from nothing",
            ("optimisation.epochs=null", f"optimisation.steps={2 * _FEWEST_STEPS}"),
        )
    return None
