"""The trials of a sweep, as plain values: what is set, what it is called, what it trains."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from d3etr.config.overrides import as_overrides
from d3etr.config.sweep import Domain, SweepConfig
from d3etr.logs import get_logger

logger = get_logger(__name__)

Point = dict[str, Any]
"""Configuration key -> value; keys whose condition does not hold are missing."""
NUMBER, POINT = "trial", "point"
"""Ray Tune's parameters of a trial."""
VAIN_SAMPLES = 10_000
"""So many samples in a row that bring nothing new say that a space has no more points."""
NAME_LENGTH = 80
"""A trial's name becomes a folder's, with a number before and a digest behind it."""


@dataclass(frozen=True)
class Trial:
    """One configuration and seed.

    Attributes:
        number: within the sweep.
        point: what the search chose.
        seed: of the run.
        case: its name, None without cases.
    """

    number: int
    point: Point
    seed: int
    case: str | None = None

    def title(self, sweep: SweepConfig) -> str:
        """What differs from the others, for people: ``adaptive_ratio=0.5, prediction.weight=2``."""
        short = short_names(list(sweep.space))
        parts = [self.case] if self.case is not None else []
        for key, value in self.point.items():
            domain = sweep.space.get(key)
            others = () if domain is None else domain.grid or domain.choice or ()
            parts.append(f"{short[key]}={shown(value, others)}")
        parts += [f"seed={self.seed}"] if len(sweep.seeds) > 1 else []
        return ", ".join(parts)

    def label(self, sweep: SweepConfig) -> str:
        """The title, with the number before it where values are drawn, which look alike.

        ``7: learning_rate=0.00123``, as its folder begins with ``007``.
        """
        title = self.title(sweep)
        return title if sweep.search.method == "grid" else f"{self.number}: {title}"

    def name(self, sweep: SweepConfig) -> str:
        """The same as a run's name: ``003_adaptive_ratio-0.5_prediction.weight-2``."""
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", self.title(sweep).replace(", ", "_"))
        return f"{self.number:03d}_{words}"[:NAME_LENGTH].rstrip("-_.")

    def recipe(self, sweep: SweepConfig) -> Path:
        """The recipe file that it starts from."""
        case = None if self.case is None else sweep.cases[self.case]
        return sweep.recipe if case is None or case.recipe is None else case.recipe

    def overrides(self, sweep: SweepConfig) -> tuple[str, ...]:
        """Everything on top of the recipe: the sweep's, the case's, the point, the seed."""
        case = () if self.case is None else sweep.cases[self.case].set
        return (*sweep.set, *case, *as_overrides(self.point), f"run.seed={self.seed}")


def planned_trials(sweep: SweepConfig) -> list[Trial]:
    """Every trial of a grid or random sweep, seeds first: an interrupted one has whole seeds."""
    points = list(planned_points(sweep))
    cases: Sequence[str | None] = list(sweep.cases) or [None]
    combinations = itertools.product(sweep.seeds, cases, points)
    return [
        Trial(number, point, seed, case) for number, (seed, case, point) in enumerate(combinations)
    ]


def planned_points(sweep: SweepConfig) -> Iterator[Point]:
    """Points of the space, each once: all of its grids, ``search.trials`` samples of the rest.

    A sample that brings nothing new is drawn anew; a space that has no more ends the search.
    """
    wanted = 1 if sweep.search.method == "grid" else sweep.search.trials
    seen, kept, number, last = set[str](), 0, 0, 0
    while kept < wanted:
        random, before = Random(f"{sweep.search.seed} {number}"), len(seen)
        for point in _expand(list(sweep.space.items()), {}, random):
            if (text := json.dumps(point)) not in seen:
                seen.add(text)
                yield point
        number += 1
        if len(seen) > before:
            kept, last = kept + 1, number
        elif number - last >= VAIN_SAMPLES:
            text = "sweep '%s' tries %d points: its space has no more, search.trials is %d"
            logger.warning(text, sweep.name, len(seen), wanted)
            return


def random_points(sweep: SweepConfig, count: int) -> list[Point]:
    """Points at random, for any method."""
    random = Random(sweep.search.seed)
    return [next(_expand(list(sweep.space.items()), {}, random)) for _ in range(count)]


def _expand(
    domains: Sequence[tuple[str, Domain]], chosen: Point, random: Random
) -> Iterator[Point]:
    if not domains:
        yield chosen
        return
    (key, domain), *rest = domains
    if not domain.applies(chosen):
        yield from _expand(rest, chosen, random)
        return
    for value in domain.grid or (sample(domain, random),):
        yield from _expand(rest, {**chosen, key: value}, random)


def sample(domain: Domain, random: Random) -> Any:
    """A value of a domain that is no grid."""
    if domain.choice is not None:
        return random.choice(domain.choice)
    if domain.uniform is not None:
        return random.uniform(*domain.uniform)
    assert domain.loguniform is not None
    low, high = domain.loguniform
    return math.exp(random.uniform(math.log(low), math.log(high)))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's shortest ending that no other key has: ``prediction.weight``."""
    return {key: _ending(key, [other for other in keys if other != key]) for key in keys}


def _ending(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if not any(other == ending or other.endswith(f".{ending}") for other in others):
            return ending
    return key


def shown(value: Any, others: Sequence[Any] = ()) -> str:
    """A value in a few characters, but enough of them that those of ``others`` differ."""
    if not isinstance(value, float):
        return str(value)
    numbers = {other for other in others if isinstance(other, float)}
    digits = 3
    while digits < 17 and len({f"{number:.{digits}g}" for number in numbers}) < len(numbers):
        digits += 1
    return f"{value:.{digits}g}"
