"""Sizes of detectors and images for a data set: pure choices, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from d3etr.project.survey import Statistics

LEAST_SIDE, CELL = 160, 16
"""Pixels of the longer side of an image at least, and what sides are multiples of."""
LARGEST_SIDE = 640
TEACHER_SCALE = 1.4
"""How much larger the teacher sees a picture than a student, where the picture has the pixels."""
_LEAST_SCALE = 1.1
_FEWEST_QUERIES, _MOST_QUERIES = 40, 300
_QUERIES_PER_OBJECT = 3
_EXACT = (320, 416, 512, 640)
_EXACT_OBJECT = 12.0
"""Pixels that the smallest objects should have where a pre-trained detector looks for them."""


@dataclass(frozen=True)
class Rung:
    """One choice of the images' size; the first whose steps fit into the time is taken.

    Attributes:
        side: of the longer side of an image, pixels.
        batch: images in a step.
        steps: a student needs at least so many.
        reason: in words.
    """

    side: int
    batch: int
    steps: int
    reason: str


@dataclass(frozen=True)
class Sizes:
    """What a detector that learns from nothing is made of.

    Attributes:
        side: of the longer side of a student's image, pixels.
        shape: height and width of a typical image over its longer side.
        scale: the teacher's side as a factor on it.
        batch: images in a step.
        queries: of both.
        size_bias: ``box_size_bias``: the logit of a typical object's size.
    """

    side: int
    shape: tuple[float, float]
    scale: float
    batch: int
    queries: int
    size_bias: float

    def sides(self, factor: float = 1.0) -> dict[str, int]:
        """``shortest_side`` and ``longest_side`` of images ``factor`` times as large."""
        longest = factor * self.side
        shortest = round(longest * min(self.shape))
        return {"shortest_side": max(16, shortest), "longest_side": round(longest * 5 / 4)}


def rungs(found: Statistics) -> tuple[Rung, ...]:
    """Sizes to try, the largest first.

    Our choice: on boards and blood cells, students learnt from nothing in 1,500 steps where the
    smallest objects had 8 pixels after resizing, and hardly where they had less than 6.

    Args:
        found: of the training split.
    """
    wanted = ((12.0, 4, 3000), (8.0, 4, 1500), (6.0, 4, 1500), (6.0, 2, 1500))
    tried = dict[tuple[int, int], Rung]()
    for pixels, batch, steps in wanted:
        side = _rounded(found.longest * pixels / max(found.smallest, 1e-9))
        upper = max(LEAST_SIDE, min(LARGEST_SIDE, found.longest))
        side = min(max(side, LEAST_SIDE), upper)
        shown = found.smallest * side / found.longest
        reason = f"small objects then have about {shown:.0f} pixels"
        tried[side, batch] = Rung(side, batch, steps, reason)
    return tuple(tried.values())


def sizes_for(found: Statistics, rung: Rung) -> Sizes:
    """Sizes of students and teacher.

    Args:
        found: of the training split.
        rung: how large images are.
    """
    scale = min(TEACHER_SCALE, found.longest / rung.side)
    return Sizes(
        side=rung.side,
        shape=(found.height / found.longest, found.width / found.longest),
        scale=round(scale, 2) if scale >= _LEAST_SCALE else 1.0,
        batch=min(rung.batch, found.images),
        queries=queries_for(found),
        size_bias=size_bias_for(found),
    )


def queries_for(found: Statistics) -> int:
    """Three for each object of the fullest image, in tens."""
    wanted = 10 * math.ceil(_QUERIES_PER_OBJECT * found.most_objects / 10)
    return min(max(wanted, _FEWEST_QUERIES), max(_MOST_QUERIES, found.most_objects))


def size_bias_for(found: Statistics) -> float:
    """The logit of a typical object's side as a share of its image's: where boxes begin."""
    share = min(max(found.relative_size, 0.005), 0.9)
    return round(math.log(share / (1 - share)), 1)


def exact_side(found: Statistics) -> int:
    """Side of the square that a pre-trained detector gets: the smallest that shows small objects.

    Args:
        found: of the training split.
    """
    wanted = found.longest * _EXACT_OBJECT / max(found.smallest, 1e-9)
    return next((side for side in _EXACT if side >= wanted), _EXACT[-1])


def _rounded(side: float) -> int:
    return CELL * round(min(side, 1e6) / CELL)


def exact_rungs(found: Statistics) -> tuple[Rung, ...]:
    """Sizes to try where a detector starts from weights that know other objects.

    Args:
        found: of the training split.
    """
    side, least = exact_side(found), _EXACT[0]
    wanted = ((side, 16, 1000), (side, 8, 500), (least, 8, 300), (least, 4, 300))
    tried = dict[tuple[int, int], Rung]()
    for size, batch, steps in wanted:
        shown = found.smallest * size / found.longest
        reason = f"small objects then have about {shown:.0f} pixels"
        tried[size, batch] = Rung(size, batch, steps, reason)
    return tuple(tried.values())
